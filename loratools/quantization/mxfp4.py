"""MXFP4: 4-bit floats in blocks of 32 with a power of two each, as in gpt-oss.

    experts.gate_up_proj_blocks U8 (experts, rows, groups, 16)   experts.gate_up_proj_scales U8 (experts, rows, groups)

In the model they are the transpose, (experts, in, out).
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the `_blocks` that have `_scales` of one axis less beside them."""
    return tuple(name for name, tensor in tensors.items() if _is_blocks(name, tensor, tensors))


def _is_blocks(name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]) -> bool:
    if not name.endswith("_blocks") or tensor.dtype != "U8":
        return False
    scales = tensors.get(name.removesuffix("blocks") + "scales")
    return scales is not None and scales.dtype in ("U8", "F8_E8M0") and scales.shape == tensor.shape[:-1]
