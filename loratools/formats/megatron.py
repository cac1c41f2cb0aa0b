"""Megatron and NeMo: `…self_attention.linear_qkv.adapter.linear_in.weight`, queries, keys and values in one.

Facts from NeMo (lora_kqv_adapter) and Megatron-Bridge (`.adapter.linear_in`). `linear_in`: (r, in), `linear_out`:
(out, r). Rows of linear_qkv come by groups of heads: the queries that share a key, that key, its value. linear_fc1 is
gate and up, one below the other. Alpha is an argument of the trainer that is not in the file.
"""

from __future__ import annotations

import re

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError
from loratools.formats.common.base import Base
from loratools.formats.common.factor_pairs import paired
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reordered, rows
from loratools.updates.lora import LoRA

_FACTOR = re.compile(
    r"(?:.+\.)?(?:decoder|encoder)\.layers\.(?P<layer>\d+)\.(?P<module>"
    r"self_attention\.linear_qkv\.adapter|self_attention\.linear_proj\.adapter|mlp\.linear_fc1\.adapter|"
    r"mlp\.linear_fc2\.adapter|self_attention\.adapter_layer\.lora_kqv_adapter|"
    r"self_attention\.adapter_layer\.lora_dense_attention_adapter|mlp\.adapter_layer\.lora_hto4h_adapter|"
    r"mlp\.adapter_layer\.lora_4htoh_adapter)\.(?P<part>linear_in|linear_out)\.weight"
)
_QKV, _FC1 = "self_attn.qkv_proj", "mlp.gate_up_proj"
_ROLES = {
    "linear_qkv": _QKV, "lora_kqv_adapter": _QKV, "linear_proj": "self_attn.o_proj",
    "lora_dense_attention_adapter": "self_attn.o_proj", "linear_fc1": _FC1, "lora_hto4h_adapter": _FC1,
    "linear_fc2": "mlp.down_proj", "lora_4htoh_adapter": "mlp.down_proj",
}  # fmt: skip


def detect(source: AdapterSource) -> bool:
    """By the names of its factors."""
    return source.container in ("pickle", "safetensors") and any(_FACTOR.fullmatch(name) for name in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source` under the names of a Llama of Hugging Face; alpha is assumed to be the rank.

    Without a base, fused projections stay so, and the adapter is uncertain: their rows come by groups of heads.

    Raises:
        UnsupportedError: Tensors of other names.
        FormatError: Factors that do not make a product.
        MismatchError: Rows that are not the base's heads.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    foreign: list[str] = []
    for name, tensor in source.tensors.items():
        parsed = _FACTOR.fullmatch(name)
        if parsed is None:
            foreign.append(name)
            continue
        role = _ROLES[next(segment for segment in reversed(parsed["module"].split(".")) if segment in _ROLES)]
        parts.setdefault(f"model.layers.{int(parsed['layer'])}.{role}", {})[parsed["part"]] = tensor
    if foreign:
        raise UnsupportedError(
            f"{quoted(source.file)} has {counted(len(foreign), 'tensor')} that are no factors of Megatron",
            details=shown([quoted(name) for name in foreign]),
        )
    updates: dict[str, LoRA] = {}
    fused: list[str] = []
    for module, (a, b) in paired(source, parts, "linear_in", "linear_out").items():
        rank = float(a.shape[0])
        split = _split(module, b, source.base)
        if split is None:
            updates[module] = LoRA(a, b, rank, "assumed")
            fused += [module] if module.endswith(_QKV) else []
        else:
            updates |= {name: LoRA(a, part, rank, "assumed") for name, part in split.items()}
    uncertainties = []
    if fused:
        uncertainties.append(
            f"{counted(len(fused), 'module')}, such as {quoted(fused[0])}, have queries, keys and values by groups of "
            "heads; how many there are is said in the config of the base alone"
        )
    return Adapter(
        updates,
        format="megatron",
        path=source.path,
        notes={"megatron": {"metadata": dict(source.metadata)}},
        uncertainties=tuple(uncertainties),
        remedy="convert it first: loratools convert ADAPTER -o OUT --to peft --base BASE",
    )


def _split(module: str, b: LazyTensor, base: Base | None) -> dict[str, LazyTensor] | None:
    """B of every part of a fused module; None if it is none, or where it is not known how to cut it."""
    if module.endswith(_FC1) and b.shape[0] % 2 == 0 and base is not None:
        parent, half = module.removesuffix(_FC1), b.shape[0] // 2
        if base.whole_number("intermediate_size") != half:
            raise MismatchError(f"{quoted(module)} has {b.shape[0]} rows, which are not gate and up of the base")
        return {f"{parent}mlp.gate_proj": rows(b, 0, half), f"{parent}mlp.up_proj": rows(b, half, 2 * half)}
    heads = base.whole_number("num_attention_heads") if base is not None else None
    if not module.endswith(_QKV) or base is None or heads is None:
        return None
    groups = base.whole_number("num_key_value_heads") or heads
    per_group = heads // groups + 2
    if b.shape[0] % (groups * per_group) or heads % groups:
        raise MismatchError(
            f"{quoted(module)} has {b.shape[0]} rows, which are no {groups} groups of {per_group} heads"
        )
    size = b.shape[0] // (groups * per_group)

    def picked(first: int, last: int) -> LazyTensor:
        """Heads first:last of every group."""
        start = [(g * per_group + first) * size for g in range(groups)]
        return reordered(b, tuple(row for s in start for row in range(s, s + (last - first) * size)))

    parent = f"{module.removesuffix(_QKV)}self_attn."
    queries = heads // groups
    return {
        f"{parent}q_proj": picked(0, queries),
        f"{parent}k_proj": picked(queries, queries + 1),
        f"{parent}v_proj": picked(queries + 1, queries + 2),
    }
