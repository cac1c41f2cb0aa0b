"""Packed numbers and their values: bit streams, floats of four and eight bits, and power-of-two scales.

Plain numpy. In a "little-endian stream", the first value is in the lowest bits of the first byte, and a value may begin
in one byte and end in the next.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.algebra.rounding import STORAGE, Floats, narrow
from loratools.tensors.dtypes import decode_float8

Integers = NDArray[np.integer[Any]]
Bytes = NDArray[np.uint8]

# The values of a 4-bit float with two bits of exponent and one of mantissa (OCP Microscaling Formats, E2M1).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_bits(packed: Bytes, bits: int) -> Bytes:
    """Unsigned integers of 1 to 8 bits from a little-endian stream along the last axis: (..., n) -> (..., 8 n // bits).

    Args:
        packed: Bytes; for 32-bit words, their bytes in little-endian order.
        bits: The width of one integer.
    """
    if bits == 8:
        return packed
    if bits in (1, 2, 4):
        each = 8 // bits
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields: Bytes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return fields.reshape(*packed.shape[:-1], packed.shape[-1] * each)
    count = packed.shape[-1] * 8 // bits
    single = np.unpackbits(packed, axis=-1, bitorder="little", count=count * bits)
    digits = single.reshape(*packed.shape[:-1], count, bits)
    values: Bytes = np.packbits(digits, axis=-1, bitorder="little")[..., 0]
    return values


def pack_bits(values: Bytes, bits: int) -> Bytes:
    """Pack unsigned integers into a little-endian stream along the last axis: the inverse of `unpack_bits`."""
    if bits == 8:
        return values
    digits = np.unpackbits(values[..., None], axis=-1, bitorder="little", count=bits)
    return np.packbits(digits.reshape(*values.shape[:-1], -1), axis=-1, bitorder="little")


def pairs_of_values(values: NDArray[np.float32], *, high_first: bool) -> NDArray[np.uint64]:
    """A table from a byte to the values of its two halves, as the bits of two float32 numbers, so that one look-up
    gives both.

    Args:
        values: The 16 values of the codes 0 to 15.
        high_first: Whether the upper half of a byte comes first.
    """
    byte = np.arange(256)
    first, second = (byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4)
    return np.ascontiguousarray(np.stack([values[first], values[second]], axis=-1)).view(np.uint64)[:, 0]


@cache
def e2m1_pairs() -> NDArray[np.uint64]:
    """The table of `pairs_of_values` for E2M1, the lower half of a byte first."""
    return pairs_of_values(np.array(E2M1, np.float32), high_first=False)


def decode_pairs(packed: Bytes, table: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Values of 4-bit codes along the last axis, by a table of `pairs_of_values`: (..., n) -> (..., 2 n)."""
    values: NDArray[np.float32] = table[packed].view(np.float32)
    return values


def e8m0(exponents: Bytes) -> NDArray[np.float32]:
    """Powers of two by their biased exponents: 2 ** (e - 127), and NaN for 255."""
    with np.errstate(over="ignore"):
        powers: NDArray[np.float32] = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
    powers[exponents == 255] = np.nan
    return powers


@cache
def float8_values(dtype: str) -> NDArray[np.float32]:
    """The 256 values of a float8 dtype, in the order of their bits."""
    return np.array([decode_float8(byte, dtype) for byte in range(256)], np.float32)


@cache
def signed_bytes() -> NDArray[np.float32]:
    """The integers that the 256 bytes stand for in two's complement, in the order of their bits."""
    return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


def nearest_float8(values: Floats, dtype: str) -> Bytes:
    """The float8 numbers nearest to the values, ties to even. Values beyond the largest number become the largest
    number.
    """
    table = float8_values(dtype)
    positive = table[:128]
    finite = np.flatnonzero(np.isfinite(positive))
    grid = positive[finite].astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    size = np.abs(values).astype(np.float64)
    index = np.searchsorted(middles, size, side="left")
    # A value in the middle goes to the code whose last bit is zero.
    on_middle = (index < len(middles)) & (size == middles[np.minimum(index, len(middles) - 1)])
    index = np.where(on_middle & (index % 2 == 1), index + 1, index)
    return (finite[index] | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def nearest_e2m1(values: Floats) -> Bytes:
    """The codes of the 4-bit floats nearest to the values, ties to even. Values beyond 6 become 6."""
    grid = np.array(E2M1[:8])
    middles = (grid[1:] + grid[:-1]) / 2
    size = np.abs(values).astype(np.float64)
    index = np.searchsorted(middles, size, side="left")
    on_middle = (index < 7) & (size == middles[np.minimum(index, 6)])
    index = np.where(on_middle & (index % 2 == 1), index + 1, index)
    return (index | np.where(np.signbit(values), 8, 0)).astype(np.uint8)


def onto_grid(values: Floats, dtype: str) -> Floats:
    """The float32 values, each rounded to the nearest number of a floating-point dtype, ties to even."""
    if dtype == "F32":
        return values
    rounded = np.empty_like(values)
    narrow(values, dtype, np.empty(values.shape, STORAGE[dtype]), rounded=rounded)
    return rounded
