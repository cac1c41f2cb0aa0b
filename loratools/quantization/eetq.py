"""EETQ: int8 weights, (in, out), with a scale for each output.

    weight I8 (in, out)   weight_scales F16 (out)

The integers may be reordered for one generation of GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.quantization.common.protocol import Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise int8 weights with `weight_scales` beside them."""
    why = "its integers may be in an order that depends on the GPU that wrote them"
    return {
        name: Unreadable("eetq", (name, f"{name}_scales"), why)
        for name, tensor in tensors.items()
        if tensor.dtype == "I8" and name.endswith("weight") and f"{name}_scales" in tensors
    }
