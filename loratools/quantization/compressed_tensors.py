"""compressed-tensors (llm-compressor): integers packed in words, int8 with scales, MXFP4 and sparse bitmasks.

    packed   weight_packed I32 (out, in * bits / 32), weight_scale (out, groups), weight_shape (2)
    mxfp4    weight_packed U8 (out, in / 2), weight_scale U8 (out, in / 32)
    int8     weight I8 (out, in), weight_scale (out, 1) or (1)
    sparse   compressed, bitmask, shape, row_offsets

Its float8 weights are found by `fp8`, its NVFP4 by `nvfp4`: they are the same numbers in whoever's file.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of packed, int8 and bitmask-compressed weights."""
    return tuple(name for name, tensor in tensors.items() if _is_compressed(name, tensor, tensors))


def _is_compressed(name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor]) -> bool:
    module, _, part = name.rpartition(".")
    scaled = f"{module}.weight_scale" in tensors
    match part:
        case "weight_packed" if tensor.dtype == "I32":
            return scaled
        case "weight_packed" if tensor.dtype == "U8":
            return scaled and f"{module}.weight_global_scale" not in tensors
        case "weight" if tensor.dtype == "I8":
            # ComfyUI's int8 has the same scale, and says what it is in a tensor of JSON.
            return scaled and f"{module}.comfy_quant" not in tensors
        case "compressed":
            return f"{module}.bitmask" in tensors
    return False
