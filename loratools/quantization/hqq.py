"""HQQ: integers of 1 to 8 bits, with a scale and a zero point for each group.

    W_q U8 | I32 (or the same bits called float)   scale   zero   and nbits, group_size, shape, axis, packing as tensors

SINQ stores its `W_q` with a `meta`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.lazy import LazyTensor


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the `W_q` that have a scale and a number of bits beside them."""
    return tuple(
        name
        for name in tensors
        if name.endswith(".W_q") and {name.removesuffix("W_q") + part for part in ("scale", "nbits")} <= tensors.keys()
    )
