"""Several low-rank deltas of one shape in common coordinates, in which each is a small matrix.

    delta_i = left @ core_i @ right^T        left: (out, p)   core_i: (p, q)   right: (in, q)   p, q <= sum of ranks

left are the left singular vectors of the deltas side by side, `[delta_1 ... delta_T]`, and right the right singular
vectors of the deltas above one another (a higher-order SVD of the stack; De Lathauwer, De Moor and Vandewalle, SIAM J.
Matrix Anal. Appl. 2000). They depend on the deltas alone, up to signs: not on how a delta is split into its factors,
nor on the order of the deltas. Panariello et al., 2025, "Accurate and efficient low-rank model merging in core space",
https://arxiv.org/abs/2509.17786, take them from the factors instead, unscaled, so that theirs change when a factor is
multiplied by G and the other by its inverse.

Operations that commute with rotations of both sides give the same result on the cores as on the deltas. Elementwise
operations do not: on the cores they are another method.

Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.algebra.lowrank import EPS, Basis, Factors, concatenate


@dataclass(frozen=True)
class Shared:
    """Several deltas in the coordinates that they share.

    `cores[i]`: (p, q), the i-th delta between the two bases. At least 1 x 1; zero if all deltas are zero.
    """

    left: Basis
    right: Basis
    cores: tuple[Tensor, ...]


@dataclass(frozen=True)
class SideBySide:
    """The thin singular value decomposition of all deltas next to one another.

    `[delta_1 ... delta_T] = u @ diag(s) @ [v_1 ... v_T]`.

    u: (out, p)   s: (p,) descending, all above rounding level   v_i: (p, in)
    """

    u: Tensor
    s: Tensor
    v: tuple[Tensor, ...]


def shared(deltas: Sequence[Factors]) -> Shared:
    """Return the deltas in their common coordinates, in O((out + in) R^2), where R is the sum of ranks."""
    left, right, cores = _raw(deltas)
    p, q = _directions(torch.cat(cores, dim=1)), _directions(torch.cat([c.mT for c in cores], dim=1))
    return Shared(left.rotated(p), right.rotated(q), tuple(p.mT @ c @ q for c in cores))


def side_by_side(deltas: Sequence[Factors]) -> SideBySide:
    """Return the thin SVD of `[delta_1 ... delta_T]`, (out, T in), without forming it.

    Ordered by singular value, signs as `lowrank.fix_signs` has them on left.
    """
    left, right, cores = _raw(deltas)
    u, s, vt = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    rank = _count(s, cores[0].shape[0], len(cores) * cores[0].shape[1])
    vectors = left.times(u[:, :rank])
    sign = torch.where(vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).squeeze(0) < 0, -1.0, 1.0).double()
    parts = torch.split(vt[:rank], cores[0].shape[1], dim=1)
    return SideBySide(vectors * sign, s[:rank], tuple(sign[:, None] * right.times(v.mT).mT for v in parts))


def _raw(deltas: Sequence[Factors]) -> tuple[Basis, Basis, list[Tensor]]:
    """Bases from the QR of the concatenated factors, or unit vectors if those are fewer, and the cores."""
    joined = concatenate([(1.0, d) for d in deltas])
    left, r_b = _triangular(joined.b)
    right, r_a = _triangular(joined.a.mT)
    ranks = [d.rank for d in deltas]
    pairs = zip(torch.split(r_b, ranks, dim=1), torch.split(r_a, ranks, dim=1), strict=True)
    return left, right, [b @ a.mT for b, a in pairs]


def _triangular(columns: Tensor) -> tuple[Basis, Tensor]:
    rows, count = columns.shape
    if count >= rows:
        return Basis(), columns
    reflections, taus = torch.geqrf(columns)
    return Basis(reflections, taus), reflections[:count].triu()


def _directions(wide: Tensor) -> Tensor:
    """The left singular vectors of a matrix, (rows, k), whose singular values are above rounding level; at
    least one.
    """
    # Computed from the triangular factor of its transpose, which has as few columns as the matrix has rows.
    triangle: Tensor = torch.linalg.qr(wide.mT, mode="r").R.mT
    u, s, _ = torch.linalg.svd(triangle, full_matrices=False)
    vectors: Tensor = u[:, : _count(s, *wide.shape)]
    return vectors


def _count(s: Tensor, rows: int, columns: int) -> int:
    """How many singular values are above the rounding level of products of factors."""
    return max(1, int((s > 8 * max(rows, columns) * EPS * s[0]).sum()))
