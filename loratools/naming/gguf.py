"""How GGUF names the modules of a Hugging Face model, and in which order llama.cpp keeps the rows of some.

Facts from llama.cpp's conversion scripts and the `gguf` package's tensor_mapping.py, held against the latter by test.
Modules whose conversion does more than rename are refused by name, except for two cases: llama.cpp rotates neighbouring
rows of a query or key head where Hugging Face rotates its two halves, so these rows are interleaved ("permuted"); and
it has all queries of Falcon before all keys and values, where Hugging Face has them group by group ("grouped").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratools.naming.heads import heads_field


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp and its names.

    `modules`: Hugging Face name -> GGUF name, without `.weight`, `{}` for the layer.

    `mixture`: what the module of a mixture of experts is called; its experts are stacked. `interleaved`: whether the
    rows of queries and keys are. `grouped`: whether Hugging Face has the rows of `attn_qkv` group by group. `wrapped`:
    what the names begin with in a model that also sees or hears, and what in one of text alone. `changed`: modules, by
    a part of their names, that llama.cpp's conversion changes beside their names, and how. `halves`: modules whose
    rows are two modules there, one after the other. `unmapped`: modules as in `modules`, which the conversion names
    itself, beside the gguf package's map.
    """

    name: str
    modules: Mapping[str, str]
    mixture: str | None = None
    interleaved: bool = False
    wrapped: tuple[str, str] = ("", "")
    changed: Mapping[str, str] = field(default_factory=dict)
    grouped: bool = False
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    unmapped: Mapping[str, str] = field(default_factory=dict)

    def reorders(self, module: str) -> bool:
        """Whether llama.cpp has the rows of a module, by its GGUF name, in another order than Hugging Face."""
        return (self.interleaved and heads_field(module) is not None) or (self.grouped and module.endswith(".attn_qkv"))

    def reason_absent(self, module: str) -> str:
        """Why a module has no name there."""
        reasons = [reason for part, reason in self.changed.items() if f".{part}." in f"{module}."]
        return reasons[0] if reasons else f"no module of {self.name} that GGUF has a name for"


_OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_QWEN_MOE = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_SHARED_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_LATENT_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.o_proj": "attn_output",
}
_FUSED_GATE = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LFM2 = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
_LLAMA4 = {
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
_EXPERT_ROLES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def _layers(*tables: Mapping[str, str]) -> dict[str, str]:
    inside = {f"model.layers.{{}}.{hf}": f"blk.{{}}.{gguf}" for table in tables for hf, gguf in table.items()}
    return {**_OUTSIDE, **inside}


def _t5_layers() -> dict[str, str]:
    names: dict[str, str] = {}
    for stack, blocks in (("encoder", "enc.blk"), ("decoder", "dec.blk")):
        attention = [(0, "SelfAttention", "attn")] + (
            [(1, "EncDecAttention", "cross_attn")] if stack == "decoder" else []
        )
        for layer, module, name in attention:
            names |= {
                f"{stack}.block.{{}}.layer.{layer}.{module}.{part}": f"{blocks}.{{}}.{name}_{part}" for part in "qkvo"
            }
        feed = f"{stack}.block.{{}}.layer.{len(attention)}.DenseReluDense"
        names |= {f"{feed}.wi_0": f"{blocks}.{{}}.ffn_gate", f"{feed}.wi_1": f"{blocks}.{{}}.ffn_up"}
        names[f"{feed}.wo"] = f"{blocks}.{{}}.ffn_down"
    return names


_INNER = ("model.language_model.", "model.")
_LINEAR_ATTENTION = {"linear_attn": "llama.cpp puts rows and columns of linear attention in another order"}
_FUSED_EXPERTS = {"experts": "llama.cpp takes the fused experts apart and transposes them"}
_DENSE = _layers(_ATTENTION, _GATED)
# The head is always the embedding, so that there is no tensor of its own.
_TIED = {hf: gguf for hf, gguf in _DENSE.items() if gguf != "output"}
_LLAMA = Architecture(
    "llama", _layers(_ATTENTION, _GATED, {"block_sparse_moe.gate": "ffn_gate_inp"}), "block_sparse_moe", True
)
_GRANITE_HYBRID = Architecture(
    "granitehybrid",
    _layers(_ATTENTION, {"mamba.in_proj": "ssm_in", "mamba.out_proj": "ssm_out"}),
    interleaved=True,
    # The name of the last of them depends on whether the model has experts; see `architecture_of`.
    halves={"model.layers.{}.shared_mlp.input_linear": ("blk.{}.ffn_gate", "blk.{}.ffn_up")},
    unmapped={"model.layers.{}.shared_mlp.output_linear": "blk.{}.ffn_down"},
    changed={"block_sparse_moe": "llama.cpp takes gate and up of all experts apart"},
)
# By the `model_type` of a Hugging Face config.
BY_MODEL_TYPE: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "granite": Architecture("granite", _DENSE, interleaved=True),
    "gpt_oss": Architecture(
        "gpt-oss",
        _layers(_ATTENTION, {"mlp.router": "ffn_gate_inp"}),
        "mlp",
        changed={"experts": "llama.cpp takes gate and up apart, which stand in turn in the experts of gpt-oss"},
    ),
    "granitemoehybrid": _GRANITE_HYBRID,
    "qwen2_vl": Architecture("qwen2vl", _DENSE, wrapped=_INNER),
    "qwen2_5_vl": Architecture("qwen2vl", _DENSE, wrapped=_INNER),
    "qwen3_5_text": Architecture("qwen35", _DENSE, changed=_LINEAR_ATTENTION),
    "qwen3_5": Architecture("qwen35", _DENSE, changed=_LINEAR_ATTENTION, wrapped=_INNER),
    "qwen3_next": Architecture("qwen3next", _layers(_ATTENTION, _QWEN_MOE), "mlp", changed=_LINEAR_ATTENTION),
    "qwen2": Architecture("qwen2", _DENSE),
    "qwen2_moe": Architecture("qwen2moe", _layers(_ATTENTION, _QWEN_MOE), "mlp"),
    "qwen3": Architecture("qwen3", _DENSE),
    "qwen3_moe": Architecture("qwen3moe", _layers(_ATTENTION, {"mlp.gate": "ffn_gate_inp"}), "mlp"),
    "gemma": Architecture("gemma", _TIED),
    "gemma2": Architecture("gemma2", _TIED),
    "gemma3_text": Architecture("gemma3", _DENSE),
    "gemma3": Architecture("gemma3", _DENSE, wrapped=_INNER),
    "gemma4_text": Architecture("gemma4", _DENSE),
    "gemma4": Architecture("gemma4", _DENSE, wrapped=_INNER),
    "glm4": Architecture("glm4", _layers(_ATTENTION, _FUSED_GATE)),
    "llama4_text": Architecture("llama4", _layers(_ATTENTION, _LLAMA4), changed=_FUSED_EXPERTS),
    "llama4": Architecture(
        "llama4", _layers(_ATTENTION, _LLAMA4), changed=_FUSED_EXPERTS, wrapped=("language_model.", "")
    ),
    "lfm2": Architecture("lfm2", _layers(_LFM2)),
    "deepseek_v3": Architecture(
        "deepseek2",
        _layers(_LATENT_ATTENTION, _GATED, _SHARED_EXPERTS),
        "mlp",
        changed={"kv_b_proj": "llama.cpp cuts it in two, one of which is transposed"},
    ),
    "falcon": Architecture(
        "falcon",
        {
            "transformer.word_embeddings": "token_embd",
            "lm_head": "output",
            "transformer.h.{}.self_attention.query_key_value": "blk.{}.attn_qkv",
            "transformer.h.{}.self_attention.dense": "blk.{}.attn_output",
            "transformer.h.{}.mlp.dense_h_to_4h": "blk.{}.ffn_up",
            "transformer.h.{}.mlp.dense_4h_to_h": "blk.{}.ffn_down",
        },
        grouped=True,
    ),
    "t5": Architecture("t5", {"shared": "token_embd", "lm_head": "output"} | _t5_layers()),
    "phi3": Architecture(
        "phi3",
        _layers({
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }),
    ),
    "starcoder2": Architecture("starcoder2", _layers(_ATTENTION, {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"})),
    "stablelm": Architecture("stablelm", _DENSE),
    "olmo2": Architecture("olmo2", _DENSE),
}  # fmt: skip
# Of several models with one architecture, the one of text alone: nothing in the file tells them apart.
BY_NAME: dict[str, Architecture] = {a.name: a for a in reversed(BY_MODEL_TYPE.values())}
# Models whose adapters llama.cpp reads, and of which it is not known here what its conversion does to which rows.
REFUSED: dict[str, str] = {
    "nemotron_h": "llama.cpp names its layers by a pattern of the config, and those with experts otherwise",
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def gguf_module(architecture: Architecture, module: str) -> str | None:
    """Return the GGUF name of a Hugging Face module.

    `model.layers.3.self_attn.q_proj` -> `blk.3.attn_q`; None for a module that has no name there.
    """
    inner, plain = architecture.wrapped
    if inner and module.startswith(inner):
        module = plain + module.removeprefix(inner)
    return _renamed(module, {**architecture.modules, **architecture.unmapped})


def hf_module(architecture: Architecture, module: str) -> str | None:
    """Return the Hugging Face name of a GGUF module.

    `blk.3.attn_q` -> `model.layers.3.self_attn.q_proj`.
    """
    tables = (architecture.modules, architecture.unmapped)
    name = _renamed(module, {gguf: hf for table in tables for hf, gguf in table.items()})
    inner, plain = architecture.wrapped
    # The head of most stands beside the inner model.
    return inner + name.removeprefix(plain) if name is not None and inner and name.startswith(plain) else name


def gguf_halves(architecture: Architecture, module: str) -> tuple[str, str] | None:
    """The GGUF names of the two halves of the rows of a Hugging Face module; None if it is no such module."""
    first = _renamed(module, {hf: halves[0] for hf, halves in architecture.halves.items()})
    second = _renamed(module, {hf: halves[1] for hf, halves in architecture.halves.items()})
    return None if first is None or second is None else (first, second)


def hf_of_half(architecture: Architecture, module: str) -> tuple[str, int] | None:
    """The Hugging Face module that a GGUF module is a half of, and which; None if it is none."""
    for half in (0, 1):
        name = _renamed(module, {halves[half]: hf for hf, halves in architecture.halves.items()})
        if name is not None:
            return name, half
    return None


def architecture_of(model_type: str | None, config: Mapping[str, object]) -> Architecture | None:
    """The architecture of a model by its config; None if it is not known.

    Granite 4 without layers of Mamba is the architecture of Granite, and names its shared layers otherwise beside
    experts.
    """
    architecture = BY_MODEL_TYPE.get(model_type or "")
    if architecture is not _GRANITE_HYBRID:
        return architecture
    experts = config.get("num_local_experts")
    with_experts = isinstance(experts, int) and experts > 0
    layers = config.get("layer_types", config.get("layers_block_type"))
    hybrid = not isinstance(layers, list) or any(layer in ("mamba", "linear_attention") for layer in layers)
    name = architecture.name if hybrid else "granitemoe" if with_experts else "granite"
    if not with_experts:
        return replace(architecture, name=name)
    shared = {hf: (f"{gate}_shexp", f"{up}_shexp") for hf, (gate, up) in architecture.halves.items()}
    unmapped = {hf: f"{gguf}_shexp" for hf, gguf in architecture.unmapped.items()}
    return replace(architecture, name=name, halves=shared, unmapped=unmapped)


def model_name(model_type: str | None, module: str) -> str:
    """The module's name in the memory of such a model, as a GGUF file is read; itself where GGUF has no name for it."""
    architecture = BY_MODEL_TYPE.get(model_type or "")
    written = gguf_module(architecture, module) if architecture is not None else None
    if architecture is None or written is None:
        return module
    return hf_module(architecture, written) or module


def gguf_stack(architecture: Architecture, parent: str, role: str) -> str | None:
    """The stacked experts of `model.layers.3.mlp`: `blk.3.ffn_up_exps`."""
    parsed = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)", parent)
    if parsed is None or parsed[2] != architecture.mixture or role not in _EXPERT_ROLES:
        return None
    return f"blk.{parsed[1]}.{_EXPERT_ROLES[role]}"


def hf_stack(architecture: Architecture, module: str) -> tuple[str, str] | None:
    """Parent and role of stacked experts: `blk.3.ffn_up_exps` -> `model.layers.3.mlp`, `up_proj`."""
    parsed = re.fullmatch(r"blk\.(\d+)\.(ffn_\w+_exps)", module)
    role = next((r for r, name in _EXPERT_ROLES.items() if parsed is not None and name == parsed[2]), None)
    if parsed is None or role is None or architecture.mixture is None:
        return None
    return f"model.layers.{parsed[1]}.{architecture.mixture}", role


def _renamed(module: str, table: Mapping[str, str]) -> str | None:
    # Of several numbers the first is the layer's; others are a part of the name.
    number = _NUMBER.search(module)
    template = table.get(_NUMBER.sub("{}", module, count=1))
    return template.format(number[0] if number is not None else "") if template is not None else None
