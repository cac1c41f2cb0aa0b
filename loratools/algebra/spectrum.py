"""Numbers that say how many directions a matrix really uses, from its singular values alone.

Both lie between 1 and the rank for anything non-zero, ignore scale, and are 0 for a zero matrix.

- stable rank `||M||_F^2 / ||M||_2^2` (Rudelson and Vershynin, "Sampling from large matrices", J. ACM 2007): moved by
  the largest direction only.
- effective rank `exp(H(p))`, `p = s / sum(s)` (Roy and Vetterli, "The effective rank", EUSIPCO 2007): all directions
  count.
  Many papers put `p = s^2 / sum(s^2)` under the same name; that one is smaller and is not what is computed here.
"""

from __future__ import annotations

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


def _scaled(s: Tensor) -> Tensor:
    """Return s in float64, divided by its maximum where that is not zero, so that squares stay in range."""
    s = s.double()
    largest = s.max() if s.numel() else torch.zeros((), dtype=torch.float64)
    return s / largest if largest > 0 else s
