"""What the methods that work with singular vectors share. All matrices are cores, at most the sum of ranks large."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Svd


def cut(core: Tensor, most: int | None = None) -> Svd:
    """The singular value decomposition without what is rounding, and of at most `most` values."""
    import torch

    from loratools.algebra.lowrank import EPS, Svd, numerical_rank

    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    # Cores are products: what should be zero is a few roundings.
    rank = numerical_rank(s, (core.shape[0], core.shape[1]), 64 * EPS)
    rank = rank if most is None else min(rank, most)
    return Svd(u[:, :rank], s[:rank], vt[:rank])


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest (the polar factor).

    Where the columns depend on one another it is the nearest partial isometry: directions that are not there are not
    made up.
    """
    svd = cut(columns)
    return svd.u @ svd.vt
