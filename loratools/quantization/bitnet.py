"""BitNet: ternary weights, four to a byte, with one scale.

    weight U8 (out / 4, in)   weight_scale (1)

NVFP4 also has bytes and a `weight_scale`, but one scale for each block.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.quantization.common.protocol import Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise byte weights whose only scale is one plain number."""
    why = "ternary weights are not unpacked: whether the scale multiplies or divides depends on the layer's class"
    return {
        name: Unreadable("bitnet", (name, f"{name}_scale"), why)
        for name, tensor in tensors.items()
        if _is_ternary(name, tensor, tensors)
    }


def _is_ternary(name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]) -> bool:
    if tensor.dtype != "U8" or not name.endswith("weight") or f"{name}_scale_2" in tensors:
        return False
    scale = tensors.get(f"{name}_scale")
    return scale is not None and scale.elements == 1 and scale.dtype in ("F32", "F16", "BF16")
