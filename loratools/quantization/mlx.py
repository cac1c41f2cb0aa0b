"""MLX: integers of 2 to 8 bits packed in words, with a scale and an offset for each group.

    weight U32 (out, in * bits / 32)   scales (out, in / group)   biases (out, in / group), or qbiases

Its modes `mxfp4`, `mxfp8` and `nvfp4` have scales of a byte, and no biases.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of `weight` in words of 32 bits without sign, with `scales` beside them."""
    return tuple(
        name
        for name, tensor in tensors.items()
        if tensor.dtype == "U32" and name.endswith("weight") and name.removesuffix("weight") + "scales" in tensors
    )
