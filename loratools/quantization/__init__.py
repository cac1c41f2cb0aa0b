"""Schemes for quantised weights, one file each: whose numbers are these packed integers?

A scheme's file has `recognise(tensors, config) -> names`: the stored tensors that carry quantised values, decided by
their dtypes and the keys beside them. A config alone says nothing: it may be missing, or left over from before the
weights were dequantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools import registry
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor

UNKNOWN = "unknown packed"

_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
# What the packed values of a weight are called when it is not `weight` itself.
_PACKED_NAMES = ("weight", "qweight", "weight_packed")


@dataclass(frozen=True)
class Scheme:
    """`name`: the scheme, or several joined by ` + `. `weights`: the stored tensors that carry quantised values;
    none where only the config speaks of it. `example`: the first of them, with dtype and shape, for messages."""

    name: str
    weights: tuple[str, ...]
    example: str


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Scheme | None:
    """How the weights are quantised; None where they are plain numbers and the config claims nothing else.

    Tensors go before the config. A config that names a scheme of which no tensor shows gives that name, without
    weights: what the tensors then are is not known well enough to compute with them.
    """
    found: dict[str, list[str]] = {}
    # Most checkpoints are plain throughout. HQQ may store its integers as the bits of floats, under a name of its own.
    if any(t.dtype not in _PLAIN or name.endswith(".W_q") for name, t in tensors.items()):
        for scheme in registry.names("quantization"):
            if names := registry.load("quantization", scheme).recognise(tensors, config):
                found[scheme] = list(names)
        known = {name for names in found.values() for name in names}
        if unknown := [name for name, t in tensors.items() if name not in known and _is_packed(name, t)]:
            found[UNKNOWN] = unknown
    if not found:
        declared = _declared(config)
        return None if declared is None else Scheme(declared, (), "the config's quantization_config")
    claimed = {name for names in found.values() for name in names}
    weights = tuple(name for name in tensors if name in claimed)
    first = tensors[weights[0]]
    shape = " x ".join(str(size) for size in first.shape)
    return Scheme(" + ".join(found), weights, f"{weights[0]} ({first.dtype}, {shape})")


def _is_packed(name: str, tensor: LazyTensor) -> bool:
    """Numbers that cannot be a plain weight: less than a byte each, or integers where a matrix is expected."""
    if DTYPE_BITS[tensor.dtype] < 8:
        return True
    integer = tensor.dtype[0] in "IU"
    return integer and len(tensor.shape) >= 2 and name.rpartition(".")[2] in _PACKED_NAMES


def _declared(config: Mapping[str, object]) -> str | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        # llm-compressor once wrote `compression_config`; MLX writes `quantization`, and a copy under the usual name.
        for key, default in (
            ("quantization_config", "unknown"),
            ("compression_config", "compressed-tensors"),
            ("quantization", "mlx"),
        ):
            if isinstance(said := part.get(key), Mapping) and said:
                return _method(said, default)
    return None


def _method(said: Mapping[str, object], default: str) -> str:
    method = said.get("quant_method")
    if isinstance(method, str) and method:
        return method
    # transformers of 2023 wrote no quant_method for bitsandbytes.
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return "bitsandbytes"
    return "mlx" if {"group_size", "bits"} <= said.keys() else default
