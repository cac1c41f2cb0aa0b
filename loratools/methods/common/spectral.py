"""Code that the methods on singular vectors share. All matrices are cores, at most as large as the sum of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Svd


def cut(core: Tensor, most: int | None = None) -> Svd:
    """The singular value decomposition without values at rounding level, and with at most `most` values."""
    import torch

    from loratools.algebra.lowrank import EPS, Svd, numerical_rank

    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    # Cores are products: a value that should be zero is a few roundings.
    rank = numerical_rank(s, (core.shape[0], core.shape[1]), 64 * EPS)
    rank = rank if most is None else min(rank, most)
    return Svd(u[:, :rank], s[:rank], vt[:rank])


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (the polar factor).

    If the columns are linearly dependent, it is the nearest partial isometry: no directions are invented.
    """
    svd = cut(columns)
    return svd.u @ svd.vt
