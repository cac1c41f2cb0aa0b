"""The names of 8-bit number formats in reports."""

from __future__ import annotations


def eight_bit_format(dtype: str) -> str:
    """The number format in words, by the stored dtype: `int8`, `fp8 e4m3`, and so on."""
    return "int8" if dtype == "I8" else f"fp8 {dtype.removeprefix('F8_').lower()}"
