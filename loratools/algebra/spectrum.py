"""Measures of how many directions a matrix really uses, computed from its singular values.

Both lie between 1 and the rank for anything non-zero, ignore scale, and are 0 for a zero matrix.

- stable rank `||M||_F^2 / ||M||_2^2` (Rudelson and Vershynin, "Sampling from large matrices", J. ACM 2007): moved by
  the largest direction only.
- effective rank `exp(H(p))`, `p = s / sum(s)` (Roy and Vetterli, "The effective rank", EUSIPCO 2007): all directions
  count.
  Many papers put `p = s^2 / sum(s^2)` under the same name; that one is smaller and is not what is computed here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stable_rank(s: Tensor) -> float:
    """Return `sum(s^2) / max(s)^2`.

    s: (k,) singular values
    """
    s = _scaled(s)
    return float((s * s).sum())


def effective_rank(s: Tensor) -> float:
    """Return `exp(-sum(p ln p))` with `p = s / sum(s)`, in the sense of Roy and Vetterli.

    s: (k,) singular values
    """
    s = _scaled(s)
    if not s.any():
        return 0.0
    p = s / s.sum()
    # xlogy: 0 ln 0 is 0 here, and a rank-deficient spectrum has such terms.
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def effective_rank_estimate(s: Tensor, tail: float, count: int) -> float:
    """Return the effective rank of a spectrum of which only the largest values are known.

        s: (k,) the largest

    tail: sum of the squares of the others. count: how many there are. They are taken to be equal, which gives them the
    most entropy that they can have with this sum of squares: mostly an upper bound.
    """
    if not count or tail <= 0 or not s.numel():
        return effective_rank(s)
    each = min(math.sqrt(tail / count), float(s[-1]))
    return effective_rank(torch.cat([s.double(), torch.full((count,), each, dtype=torch.float64, device=s.device)]))


def gavish_donoho_cut(noise: float, shape: tuple[int, int]) -> float:
    """Return the singular value below which keeping a direction of a noisy matrix adds more error than it removes.

    noise: standard deviation of its entries. Gavish and Donoho, "The optimal hard threshold for singular values is
    4/sqrt(3)", IEEE Trans. Inf. Theory 2014: `lambda(beta) sqrt(n) noise`, for (m, n) with beta = m / n at most 1.
    """
    n, m = max(shape), min(shape)
    beta = m / n
    root = math.sqrt(beta * beta + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root)) * math.sqrt(n) * noise


def _scaled(s: Tensor) -> Tensor:
    """Return s in float64, divided by its maximum where that is not zero, so that squares stay in range."""
    s = s.double()
    largest = s.max() if s.numel() else torch.zeros((), dtype=torch.float64)
    return s / largest if largest > 0 else s
