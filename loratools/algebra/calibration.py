"""Steps after combining: calibration of shared singular values, and restoring the size of a delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.algebra.lowrank import Factors, Svd


def calibrated(merged: Svd, deltas: Sequence[Factors], *, least: float = 1.0) -> Svd:
    """Return `merged` with each singular value divided by how many of the `deltas` share its direction.

    In the output direction `u_r`, the i-th delta has the response `a = u_r^T delta_i`, and the merged one has `s_r
    v_r`. `k_i = <s_r v_r, a> / |a|^2` is how far the merged delta overstates the response of the i-th one. `s_r`
    becomes `s_r * T / sum_i max(least, k_i)`. Directions that several deltas share add up in a merge and are scaled
    down; directions of a single delta stay. Singular value calibration, "When shared knowledge hurts", 2026,
    https://arxiv.org/abs/2602.05536. Singular values may lose their order.
    """
    shares = torch.zeros_like(merged.s)
    for f in deltas:
        projected_b = merged.u.mT @ f.b.double()
        a = f.a.double()
        product = merged.s * (projected_b * (a @ merged.vt.mT).mT).sum(dim=1)
        square = ((projected_b @ (a @ a.mT)) * projected_b).sum(dim=1)
        shares += torch.where(square > 0, product / torch.where(square > 0, square, 1.0), 0.0).clamp(min=least)
    return Svd(merged.u, merged.s * len(deltas) / shares, merged.vt)


def dense_svd(delta: Tensor) -> Svd:
    """Return all of the singular value decomposition of a dense matrix, in float64."""
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return Svd(u, s, vt)
