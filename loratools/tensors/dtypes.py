"""The dtypes of tensors: their safetensors names, their sizes in bits, and torch's names for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype as TorchDtype

# Every dtype of the safetensors format, with its width in bits (F4 and F6 are packed).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

_TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_FROM_TORCH = {name: dtype for dtype, name in _TORCH_NAMES.items()}

# The floating-point dtypes that weights and factors are stored in; `--dtype` takes the torch spelling.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# 8-bit floating-point dtypes; F8_E8M0 has no mantissa, and is only used for scales.
FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Stored mantissa bits of the floating-point dtypes.
MANTISSA_BITS: dict[str, int] = {
    "F64": 52, "F32": 23, "F16": 10, "BF16": 7,
    "F8_E4M3": 3, "F8_E4M3FNUZ": 3, "F8_E5M2": 2, "F8_E5M2FNUZ": 2, "F8_E8M0": 0,
    "F6_E2M3": 3, "F6_E3M2": 2, "F4": 1,
}  # fmt: skip
# Exponent bits, mantissa bits, bias. "FNUZ" and E4M3 have no infinity; each has its own NaN.
_FLOAT8 = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16)}


def torch_dtype(dtype: str) -> TorchDtype:
    """The torch dtype of a safetensors dtype; KeyError for packed dtypes, which torch lacks."""
    import torch

    dtype_of_torch: TorchDtype = getattr(torch, _TORCH_NAMES[dtype])
    return dtype_of_torch


def dtype_name(dtype: TorchDtype) -> str:
    """The safetensors spelling of a torch dtype."""
    return _FROM_TORCH[str(dtype).removeprefix("torch.")]


def decode_float8(byte: int, dtype: str) -> float:
    """The number that eight bits of a float8 dtype stand for."""
    exponent_bits, mantissa_bits, bias = _FLOAT8[dtype]
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if dtype.endswith("FNUZ"):
        if byte == 0x80:  # instead of a negative zero
            return math.nan
    elif dtype == "F8_E4M3":
        if byte & 0x7F == 0x7F:
            return math.nan
    elif exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def is_floating(dtype: str) -> bool:
    """Whether tensors of this dtype are floating-point numbers, of any width."""
    return dtype in MANTISSA_BITS


def parse_float_dtype(name: str) -> str | None:
    """Return the safetensors name of a floating-point dtype, given in any common spelling.

    `bfloat16`, `bf16` or `BF16` -> `BF16`; None if `name` is not a floating-point dtype that weights are stored in.
    """
    aliases = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "half": "F16", "float": "F32", "double": "F64"}
    lower = name.lower()
    dtype = aliases.get(lower) or _FROM_TORCH.get(lower) or name.upper()
    return dtype if dtype in FLOAT_DTYPES else None
