"""What reports call numbers of 8 bits."""

from __future__ import annotations


def eight_bit_format(dtype: str) -> str:
    """The number format in words, by the dtype of the stored numbers: `int8`, `fp8 e4m3`, and the like."""
    return "int8" if dtype == "I8" else f"fp8 {dtype.removeprefix('F8_').lower()}"
