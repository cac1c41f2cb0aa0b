"""How GGUF names the modules of a Hugging Face model, and in which order llama.cpp keeps the rows of some.

Facts from llama.cpp's conversion scripts and the `gguf` package's tensor_mapping.py, held against the latter by test.
Architectures whose conversion does more than rename are not here, save for one: llama.cpp rotates neighbouring rows
of a query or key head where Hugging Face rotates its two halves, so these rows are interleaved ("permuted").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """`modules`: Hugging Face name -> GGUF name, without `.weight`, `{}` for the layer.

    `mixture`: what the module of a mixture of experts is called; its experts are stacked. `interleaved`: whether the
    rows of queries and keys are.
    """

    name: str
    modules: Mapping[str, str]
    mixture: str | None = None
    interleaved: bool = False


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
_EXPERT_ROLES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def _layers(*tables: Mapping[str, str]) -> dict[str, str]:
    inside = {f"model.layers.{{}}.{hf}": f"blk.{{}}.{gguf}" for table in tables for hf, gguf in table.items()}
    return {**_OUTSIDE, **inside}


_DENSE = _layers(_ATTENTION, _GATED)
# The head is always the embedding, so that there is no tensor of its own.
_TIED = {hf: gguf for hf, gguf in _DENSE.items() if gguf != "output"}
_LLAMA = Architecture(
    "llama", _layers(_ATTENTION, _GATED, {"block_sparse_moe.gate": "ffn_gate_inp"}), "block_sparse_moe", True
)
# By the `model_type` of a Hugging Face config.
BY_MODEL_TYPE: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "granite": Architecture("granite", _DENSE, interleaved=True),
    "qwen2": Architecture("qwen2", _DENSE),
    "qwen2_moe": Architecture("qwen2moe", _layers(_ATTENTION, _QWEN_MOE), "mlp"),
    "qwen3": Architecture("qwen3", _DENSE),
    "qwen3_moe": Architecture("qwen3moe", _layers(_ATTENTION, {"mlp.gate": "ffn_gate_inp"}), "mlp"),
    "gemma": Architecture("gemma", _TIED),
    "gemma2": Architecture("gemma2", _TIED),
    "gemma3_text": Architecture("gemma3", _DENSE),
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
BY_NAME: dict[str, Architecture] = {a.name: a for a in BY_MODEL_TYPE.values()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def gguf_module(architecture: Architecture, module: str) -> str | None:
    """`model.layers.3.self_attn.q_proj` -> `blk.3.attn_q`; None for a module that has no name there."""
    return _renamed(module, architecture.modules)


def hf_module(architecture: Architecture, module: str) -> str | None:
    """`blk.3.attn_q` -> `model.layers.3.self_attn.q_proj`."""
    return _renamed(module, {gguf: hf for hf, gguf in architecture.modules.items()})


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
    numbers = _NUMBER.findall(module)
    if len(numbers) > 1:
        return None
    template = table.get(_NUMBER.sub("{}", module))
    return template.format(*numbers) if template is not None else None
