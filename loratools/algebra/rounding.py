"""Conversion between stored and computed floating-point numbers, and bounds of the rounding errors.

Plain numpy, since a merge needs nothing more: importing torch takes longer than merging a model of a billion weights.
dtypes have their safetensors spelling. numpy has no bfloat16, so its numbers are kept as 16 bits (uint16), which are
the upper half of a float32.

The error model is the standard one (Higham, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3): an
operation returns the exact result times (1 + d) with |d| <= u, the unit roundoff; n operations in a row give at most (1
+ d) with |d| <= gamma(n).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loratools.tensors.dtypes import MANTISSA_BITS

Floats: TypeAlias = NDArray[np.floating[Any]]
Stored: TypeAlias = NDArray[Any]

# The numpy dtype that holds the stored numbers of each dtype.
STORAGE: dict[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# Exponent of the smallest normal number, and the largest finite number.
_LOWEST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}
LARGEST = {
    "F64": float(np.finfo(np.float64).max),
    "F32": float(np.finfo(np.float32).max),
    "F16": 65504.0,
    "BF16": (2 - 2.0**-7) * 2.0**127,
}


def widen(stored: Stored, dtype: str, out: Floats) -> None:
    """Write the values of stored numbers to `out`, of float32 or float64. This is exact, except from float64 to
    float32.
    """
    if dtype == "BF16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    elif dtype == "BF16":
        with np.errstate(invalid="ignore"):
            np.copyto(out, (stored.astype(np.uint32) << 16).view(np.float32))
    else:
        # numpy would warn about a signalling NaN of float16 or float64, which is NaN before and after.
        with np.errstate(invalid="ignore"):
            np.copyto(out, stored, casting="same_kind")


def narrow(values: Floats, dtype: str, out: Stored, *, rounded: Floats | None = None, keep_nan: bool = True) -> None:
    """Round float32 or float64 values to stored numbers, to nearest, ties to even, once. Overflow gives infinity.

    rounded   takes what the stored numbers are worth, in the dtype of the values. It is also what is worked in: fresh
              memory for each of many blocks costs more than the rounding.
    keep_nan  False saves a look at every value where NaNs have been excluded; one may then come out as zero.
    """
    if dtype == "BF16":
        _narrow_to_bfloat16(values, out, rounded, keep_nan)
        return
    with np.errstate(over="ignore"):
        np.copyto(out, values, casting="same_kind")
    if rounded is not None:
        widen(out, dtype, rounded)


def _narrow_to_bfloat16(values: Floats, out: Stored, rounded: Floats | None, keep_nan: bool) -> None:
    single = values.dtype == np.float32
    bits = (values if single else rounded_to_odd(values)).view(np.uint32)
    # Add half a unit less one, and one more if the last kept bit is set: ties go to even. A carry into the exponent is
    # right, up to infinity; beyond it would turn NaNs into zeros.
    work = np.right_shift(bits, 16, out=rounded.view(np.uint32) if single and rounded is not None else None)
    work &= 1
    work += bits
    work += 0x7FFF
    if keep_nan:
        work[np.isnan(values)] = 0x7FC00000
    np.right_shift(work, 16, out=out, dtype=np.uint32, casting="same_kind")
    if rounded is not None:
        work &= 0xFFFF0000
        if not single:
            np.copyto(rounded, work.view(np.float32))


def rounded_to_odd(values: Floats) -> NDArray[np.float32]:
    """Round float64 to float32 such that rounding further, to a shorter format, gives the same as rounding once.

    Boldo and Melquiond, 2008, "Emulation of FMA and correctly rounded sums": truncate, and set the last bit if anything
    was lost.
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    with np.errstate(invalid="ignore"):
        bits -= (np.abs(nearest) > np.abs(values)).astype(np.uint32)
        bits |= ((bits.view(np.float32) != values) & np.isfinite(values)).astype(np.uint32)
    return nearest


def unit_roundoff(dtype: str) -> float:
    """Return the largest relative error of rounding to nearest in `dtype`: half the spacing just above 1."""
    return 2.0 ** -(MANTISSA_BITS[dtype] + 1)


def gamma(n: int, unit: float) -> float:
    """Return `n u / (1 - n u)`: the bound on the relative error of n consecutive roundings."""
    if n * unit >= 1:
        raise ValueError(f"{n} roundings to a unit of {unit} have no bound")
    return n * unit / (1 - n * unit)


def ulp(x: Floats, dtype: str) -> NDArray[np.float64]:
    """Return the spacing of `dtype` at |x|: the distance from one number of the grid to the next in x's binade.

    x need not be on the grid. Zero and subnormal numbers have the spacing of subnormal numbers; NaN and infinite values
    give NaN.
    """
    wide = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(wide)
    # frexp writes |x| as f * 2^e with f in [1/2, 1): x lies in the binade that starts at 2^(e - 1).
    exponent = np.frexp(np.where(finite, wide, 1.0))[1] - 1
    exponent = np.where(wide == 0, _LOWEST[dtype], np.maximum(exponent, _LOWEST[dtype]))
    spacing: NDArray[np.float64] = np.ldexp(1.0, exponent - MANTISSA_BITS[dtype])
    return np.where(finite, spacing, np.nan)


def merge_error_bound(
    base_abs: Floats, product_abs: Floats, result: Floats, dtype: str, terms: int, *, nearest: bool = True
) -> NDArray[np.float64]:
    """Return the largest allowed difference of a stored weight from the exact `base + update`, element by element.

        ulp(result) / 2 + gamma(terms + 2) * (base_abs + product_abs)

    The first part is the one rounding to `dtype`. The second is the error of the sum: `terms` products and their sum,
    the scale, and the addition to the base, in float32, or in float64 if the weight itself is float64.

    base_abs: |W|. product_abs: scale * |b| @ |a|, summed over adapters (not the absolute value of the sum: terms that
    cancel still round). result: the merged weight. terms: rank, added up over adapters. nearest: False where the
    stored number may be either neighbour of the sum, so that the first part is a whole ulp.
    """
    unit = unit_roundoff("F64" if dtype == "F64" else "F32")
    sizes = np.asarray(base_abs, dtype=np.float64) + np.asarray(product_abs, dtype=np.float64)
    return ulp(result, dtype) * (0.5 if nearest else 1.0) + gamma(terms + 2, unit) * sizes
