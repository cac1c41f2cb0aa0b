"""NVFP4: 4-bit floats in blocks of 16 with a float8 scale each, and one scale for the whole tensor.

    ModelOpt             weight U8 (out, in / 2)          weight_scale F8_E4M3 (out, in / 16)   weight_scale_2 ()
    compressed-tensors   weight_packed U8 (out, in / 2)   weight_scale F8_E4M3 (out, in / 16)   weight_global_scale (1)

ModelOpt's scale of the whole tensor multiplies, that of compressed-tensors divides.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor

# Fused experts are parameters of their own (`experts.gate_up_proj`), with `_weight_scale_2` behind their name.
_SECOND_SCALES = ("_scale_2", "_weight_scale_2", "_global_scale")


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of byte tensors with a second scale, that of the whole tensor, beside them."""
    return tuple(name for name, tensor in tensors.items() if _is_packed(name, tensor, tensors))


def _is_packed(name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]) -> bool:
    if tensor.dtype not in ("U8", "F4"):
        return False
    stem = name.removesuffix("_packed")
    return any(stem + scale in tensors for scale in _SECOND_SCALES)
