"""Which modules keep their weight as (in, out): the `Conv1D` of the GPT-2 family, a linear layer by another name.

Shapes decide this if they can. This table is for square weights, where they cannot, and for bases without an adapter to
compare with. The key is the `model_type` of a config and the last part of a name, as transformers has them.
"""

from __future__ import annotations

_GPT2 = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

# gpt_bigcode and gpt_neo use the same names for plain linear layers, so the name alone says nothing.
_CONV1D: dict[str, frozenset[str]] = {
    "gpt2": _GPT2,
    "openai-gpt": _GPT2,
    "imagegpt": _GPT2,
    "decision_transformer": _GPT2,
    "clvp": frozenset({"c_fc", "c_proj"}),
    "clvp_decoder": frozenset({"c_fc", "c_proj"}),
}


def is_known(model_type: str | None) -> bool:
    """Whether models of this type have such layers, so that the table covers each of their modules."""
    return model_type in _CONV1D


def is_conv1d(model_type: str | None, module: str) -> bool:
    """Whether `module` (a dotted name, without `.weight`) of such a model stores its weight as (in, out)."""
    return module.rpartition(".")[2] in _CONV1D.get(model_type or "", ())
