"""Float8 weights, with or without a scale beside them.

    weight F8 (out, in)   weight_scale_inv (out / 128, in / 128)   DeepSeek, Qwen: one scale per block
                          weight_scale () or (out, 1)              per tensor or per row
                          scale_weight (), and a marker scaled_fp8 ComfyUI

Without a scale the numbers mean themselves, but they are float8: a delta rounded to three bits of mantissa is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.dtypes import FLOAT8_DTYPES
from loratools.tensors.lazy import LazyTensor

# Float8 tensors that belong to another scheme's weight: scales of NVFP4, the values of quanto and torchao.
_NOT_WEIGHTS = ("scale", "scales", "scale_inv", "scale_2", "absmax", "._data", "_qdata", "scaled_fp8")


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the float8 tensors that are no scales."""
    return tuple(
        name for name, tensor in tensors.items() if tensor.dtype in FLOAT8_DTYPES and not name.endswith(_NOT_WEIGHTS)
    )
