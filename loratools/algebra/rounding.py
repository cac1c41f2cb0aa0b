"""What storing a number costs: spacing of the floating-point grids, and the error that a merge is allowed.

The model is the standard one (Higham, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3): an
operation returns the exact result times (1 + d) with |d| <= u, the unit roundoff, and n of them in a row at most (1 +
d) with |d| <= gamma(n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to nearest in `dtype`: half the spacing just above 1."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, unit: float) -> float:
    """Return `n u / (1 - n u)`: the bound on the relative error of n roundings in a row."""
    if n * unit >= 1:
        raise ValueError(f"{n} roundings to a unit of {unit} have no bound")
    return n * unit / (1 - n * unit)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of `dtype` at |x|: the distance between neighbours on the grid in the binade of x. float64.

    x does not have to be on the grid. Zero and whatever lies below the normal range get the spacing of subnormal
    numbers; what is not finite gets nan.
    """
    info = torch.finfo(dtype)
    x = x.detach().double()
    # frexp writes |x| as f * 2^e with f in [1/2, 1): x lies in the binade that starts at 2^(e - 1).
    exponent = torch.frexp(x).exponent - 1
    exponent = torch.where(x == 0, _log2(info.tiny), exponent.clamp(min=_log2(info.tiny)))
    # Powers of two, so the product is exact. The exponent stays in the normal range: eps carries the result into the
    # subnormal one.
    spacing = torch.ldexp(torch.full_like(x, info.eps), exponent)
    return torch.where(x.isfinite(), spacing, torch.nan)


def merge_error_bound(base_abs: Tensor, product_abs: Tensor, result: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Return how far a stored weight may be from the exact `base + update`, entry by entry. float64.

        ulp(result) / 2 + gamma(terms + 2) * (base_abs + product_abs)

    The first part is the one rounding to `dtype`. The second is what adding up costs: `terms` products and their sum,
    the scale, and the addition to the base, in float32, or in float64 where the weight itself is float64.

    base_abs: |W|. product_abs: scale * |b| @ |a|, summed over adapters (not the absolute value of the sum: terms that
        cancel still round).
    result: the merged weight. terms: rank, added up over adapters.
    """
    unit = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    return ulp(result, dtype) / 2 + gamma(terms + 2, unit) * (base_abs.double() + product_abs.double())


def _log2(power_of_two: float) -> int:
    return math.frexp(power_of_two)[1] - 1
