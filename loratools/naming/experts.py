"""Experts of a mixture: as modules of their own, by number, and as one stacked module.

model.layers.0.mlp.experts.7.gate_proj             Hugging Face before transformers 5, and most adapters
model.layers.0.mlp.switch_mlp.gate_proj            MLX, all experts in one tensor
model.layers.0.block_sparse_moe.experts.7.w1       Mixtral: w1 is gate, w3 is up, w2 is down

In memory, transformers 5 fuses them as (experts, out, in), or as (experts, in, out).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ONE = re.compile(r"(?P<parent>.+)\.experts\.(?P<number>\d{1,6})\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)")
_STACK = re.compile(r"(?P<parent>.+)\.switch_mlp\.(?P<leaf>gate_proj|up_proj|down_proj)")
_PLAIN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MIXTRAL = {plain: name for name, plain in _PLAIN.items()}
_MIXTRAL_PARENT = "block_sparse_moe"


class Expert(NamedTuple):
    """`parent` is the mixture's own name, `role` is gate_proj, up_proj or down_proj."""

    parent: str
    number: int
    role: str


def parse_expert(module: str) -> Expert | None:
    """One expert's module, by its Hugging Face name."""
    found = _ONE.fullmatch(module)
    if found is None:
        return None
    return Expert(found["parent"], int(found["number"]), _PLAIN.get(found["leaf"], found["leaf"]))


def expert_name(expert: Expert) -> str:
    """The Hugging Face name of one expert's module."""
    of_mixtral = expert.parent.rpartition(".")[2] == _MIXTRAL_PARENT
    return f"{expert.parent}.experts.{expert.number}.{_MIXTRAL[expert.role] if of_mixtral else expert.role}"


def parse_stack(module: str) -> tuple[str, str] | None:
    """Parent and role of a stacked module of MLX."""
    found = _STACK.fullmatch(module)
    return None if found is None else (found["parent"], found["leaf"])


def stack_name(parent: str, role: str) -> str:
    """The name that MLX gives the stacked module."""
    return f"{parent}.switch_mlp.{role}"


# Those whose layers say `is_transposed` in transformers 5, by `model_type`; the others compute with (out, in).
_IN_OUT = frozenset({"aria", "gpt_oss", "openai_privacy_filter"})


def stored_in_out(model_type: str | None) -> bool:
    """Whether the layers of experts of such a model say that they keep (experts, in, out)."""
    return model_type in _IN_OUT
