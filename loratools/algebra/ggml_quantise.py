"""Quantisation of values to new ggml blocks with new scales: the types that llama.cpp quantises without a search.

    Q4_0, Q5_0   the value of largest size becomes the lowest level, -8 or -16
    Q4_1, Q5_1   the lowest value is the offset, and the range is cut into 15 or 31 steps
    Q8_0         the largest size becomes 127

The bytes equal those of llama.cpp's reference code and of the gguf package: codes are computed with the scale before it
is rounded to float16, and halves are rounded away from zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loratools.algebra.ggml import TYPES, Singles
from loratools.algebra.packing import Bytes

_VALUES = 32


def _inverse(scale: Singles) -> Singles:
    with np.errstate(divide="ignore"):
        inverse: Singles = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return inverse


def _symmetric(lowest: int) -> Callable[[Singles], tuple[Bytes, list[Singles]]]:
    def quantised(blocks: Singles) -> tuple[Bytes, list[Singles]]:
        largest = np.take_along_axis(blocks, abs(blocks).argmax(axis=1)[:, None], axis=1)
        scale = largest / np.float32(lowest)
        codes = np.trunc(blocks * _inverse(scale) + np.float32(0.5 - lowest))
        return codes.clip(0, -2 * lowest - 1).astype(np.uint8), [scale]

    return quantised


def _affine(steps: int) -> Callable[[Singles], tuple[Bytes, list[Singles]]]:
    def quantised(blocks: Singles) -> tuple[Bytes, list[Singles]]:
        lowest = blocks.min(axis=1, keepdims=True)
        scale = (blocks.max(axis=1, keepdims=True) - lowest) / np.float32(steps)
        codes = np.trunc((blocks - lowest) * _inverse(scale) + np.float32(0.5))
        return codes.clip(0, steps).astype(np.uint8), [scale, lowest]

    return quantised


def _eight_bits(blocks: Singles) -> tuple[Bytes, list[Singles]]:
    scale = abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    size = abs(scaled)
    floors = np.floor(size)
    codes = np.sign(scaled) * (floors + np.floor(2 * (size - floors)))
    return codes.astype(np.int8).view(np.uint8), [scale]


# Each function returns the codes of blocks of 32 values, and the numbers stored before them as float16.
_QUANTISERS: dict[str, Callable[[Singles], tuple[Bytes, list[Singles]]]] = {
    "Q4_0": _symmetric(-8), "Q4_1": _affine(15), "Q5_0": _symmetric(-16), "Q5_1": _affine(31), "Q8_0": _eight_bits,
}  # fmt: skip


def quantise(kind: str, values: Singles, size: int) -> Bytes:
    """New blocks of a type: (values / 32, size) bytes for a whole number of blocks, in the order of the values.

    Args:
        kind: One of the types above.
        values: Finite float32 values, block after block.
        size: Bytes of a block.
    """
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, _VALUES)
    codes, numbers = _QUANTISERS[kind](blocks)
    packed: Bytes = np.zeros((len(blocks), size), np.uint8)
    with np.errstate(over="ignore"):
        halves = np.concatenate(numbers, axis=1).astype(np.float16)
    packed[:, : 2 * len(numbers)] = halves.view(np.uint8)
    TYPES[kind].store_codes(packed, codes)
    return packed
