"""AQLM: each group of weights is a sum of vectors from codebooks.

    codes I8 | I16 (out / group, in / group, books)   codebooks (books, size, group, group)   scales (out / group, ...)

A group's scale multiplies the sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of integer `codes` with `codebooks` and `scales` beside them."""
    return tuple(
        name
        for name, tensor in tensors.items()
        if name.endswith(".codes")
        and tensor.dtype[0] in "IU"
        and {name.removesuffix("codes") + part for part in ("codebooks", "scales")} <= tensors.keys()
    )
