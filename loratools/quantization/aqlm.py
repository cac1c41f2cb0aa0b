"""AQLM: each group of weights is a sum of vectors from codebooks.

    codes I8 | I16 (out / group, in / group, books)   codebooks (books, size, group, group)   scales (out / group, ...)

The scale of a group multiplies the sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.quantization.common.protocol import Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise integer `codes` with `codebooks` and `scales` beside them."""
    recognised: dict[str, Unreadable] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("codes")
        parts = (f"{stem}codebooks", f"{stem}scales")
        if name.endswith(".codes") and tensor.dtype[0] in "IU" and tensors.keys() >= set(parts):
            recognised[f"{stem}weight"] = Unreadable(
                "aqlm", (name, *parts), "sums of codebook vectors are not unpacked"
            )
    return recognised
