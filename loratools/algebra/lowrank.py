"""Matrices given as a product of two thin factors, handled without ever forming the product.

`delta = b @ a` with b: (out, r) and a: (r, in). With b = Q_b R_b and a^T = Q_a R_a (thin QR), the core R_b R_a^T, which
is (r, r), has the singular values of delta, and Q_b and Q_a turn its singular vectors into those of delta. That costs
O((out + in) r^2), where a dense SVD costs O(out in min(out, in)), and it is exact.

Everything is computed in float64, whatever the dtype of the factors. If products of two large or two small factors
would leave that range, although the delta does not, each rank-one term is balanced first: the largest entry of its
column of b is made equal to that of its row of a.

Alpha and scales are not known here (fold them into b), and neither are dtypes of files or matrices that are not
products (`algebra.svd`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Factors:
    """A delta as a product of two thin matrices.

    `delta = b @ a`, with any scale already folded in.

    b: (out, r)   a: (r, in)
    """

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ValueError(f"b {tuple(self.b.shape)} and a {tuple(self.a.shape)} do not multiply")

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def rank(self) -> int:
        """Number of rank-one terms: an upper bound of the rank of delta."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Svd:
    """A singular value decomposition, truncated or full.

    `delta = u @ diag(s) @ vt`, with orthonormal columns in u and rows in vt.

    u: (out, k)   s: (k,) descending   vt: (k, in)
    """

    u: Tensor
    s: Tensor
    vt: Tensor


class Decomposition(Protocol):
    """The input of `truncate`: an exact `Svd`, or the certified one of `algebra.svd`."""

    @property
    def u(self) -> Tensor: ...
    @property
    def s(self) -> Tensor: ...
    @property
    def vt(self) -> Tensor: ...


def concatenate(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Return the exact sum of `weight * delta` over the parts: factors are concatenated and ranks add up.

    The weight is folded into b. The result is float64.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    shapes = {(f.out_features, f.in_features) for _, f in parts}
    if len(shapes) > 1:
        raise ValueError(f"deltas of different shapes do not add: {sorted(shapes)}")
    return Factors(
        b=torch.cat([f.b.double() * weight for weight, f in parts], dim=1),
        a=torch.cat([f.a.double() for _, f in parts], dim=0),
    )


@dataclass(frozen=True)
class Core:
    """A singular value decomposition whose vectors are not formed yet: often only the values are needed, and only the
    vectors that are kept.

        s: (k,) descending   left: (out, r) and right: (in, r), in which p: (r, k) and z: (r, k) are the vectors
    """

    s: Tensor
    left: Basis
    right: Basis
    p: Tensor
    z: Tensor

    def leading(self, rank: int) -> Svd:
        """The vectors of the `rank` largest singular values, with these values.

        The entry of largest magnitude in each column of u is positive (the first one on ties), so equal input gives
        equal output. Singular values of zero have orthonormal vectors like all others.
        """
        u, v = self.left.times(self.p[:, :rank]), self.right.times(self.z[:, :rank])
        return Svd(*fix_signs(u, self.s[:rank], v.mT))


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns: the reflections of a QR decomposition (LAPACK's geqrf), or unit vectors if there are none,
    times `rotation` (orthonormal columns) if that is given.
    """

    reflections: Tensor | None = None
    taus: Tensor | None = None
    rotation: Tensor | None = None

    def rotated(self, rotation: Tensor) -> Basis:
        """These columns times the orthonormal columns of `rotation`, without multiplying them out yet."""
        return Basis(self.reflections, self.taus, rotation if self.rotation is None else self.rotation @ rotation)

    def times(self, x: Tensor) -> Tensor:
        """The basis times a thin matrix. Applying the reflections is cheaper than forming the basis first."""
        if self.rotation is not None:
            x = self.rotation @ x
        if self.reflections is None or self.taus is None:
            return x
        padded = x.new_zeros(self.reflections.shape[0], x.shape[1])
        padded[: x.shape[0]] = x
        product: Tensor = torch.ormqr(self.reflections, self.taus, padded)
        return product


@dataclass(frozen=True)
class Framed:
    """A delta as a small core between two orthonormal bases.

    `delta = left @ core @ right^T`, with orthonormal columns in left and right: a delta in small coordinates.

    left: (out, p)   core: (p, q)   right: (in, q)
    """

    left: Basis
    core: Tensor
    right: Basis

    def factors(self) -> Factors:
        """Factors of exactly this delta, by its singular values above rounding level; of rank 1 for a zero delta."""
        core = decompose(self)
        rank = numerical_rank(core.s, (self.core.shape[0], self.core.shape[1]), EPS)
        return truncate(core.leading(max(1, rank)), max(1, rank))


def decompose(f: Factors | Framed) -> Core:
    """Return the singular value decomposition of a delta, without forming its vectors; k = min(r, out, in). float64.

    The product is formed only if it is not larger than its factors (r above half of the smaller side), since the dense
    method is cheaper then.
    """
    if isinstance(f, Framed):
        p, s, zt = torch.linalg.svd(f.core, full_matrices=False)
        return Core(s, f.left, f.right, p, zt.mT)
    b, a = _in_range(f)
    k = min(f.rank, f.out_features, f.in_features)
    if 2 * f.rank > min(f.out_features, f.in_features):
        u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
        return Core(s[:k], Basis(), Basis(), u[:, :k], vt[:k].mT)
    left, right = torch.geqrf(b), torch.geqrf(a.mT)
    r_b, r_a = (reflections[: f.rank].triu() for reflections, _ in (left, right))
    p, s, zt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return Core(s, Basis(*left), Basis(*right), p, zt.mT)


def svd(f: Factors) -> Svd:
    """Return the singular value decomposition of `b @ a` with all of its vectors; k = min(r, out, in). float64.

    u: (out, k)   s: (k,) descending   vt: (k, in)
    """
    core = decompose(f)
    return core.leading(len(core.s))


def row_space(f: Factors) -> tuple[Tensor, float]:
    """Return orthonormal columns that span the rows of `b @ a`, (in, k), and its squared Frobenius norm. float64.

    Computed from the Gram matrices of the factors, which is several times faster than QR. Directions whose singular
    value is below 1e-7 of the largest are left out, since Gram matrices cannot tell them from rounding.
    """
    b, a = _in_range(f)
    values, vectors = torch.linalg.eigh(a @ a.mT)
    significant = values > EPS * max(a.shape) * values.max() if values.numel() else values > 0
    root = values[significant].sqrt()
    basis = (a.mT @ vectors[:, significant]) / root
    scaled = (vectors[:, significant] * root).mT
    squares, directions = torch.linalg.eigh(scaled @ (b.mT @ b) @ scaled.mT)
    real = squares > 1e-14 * squares.max() if squares.numel() else squares > 0
    return basis @ directions[:, real], float(squares.clamp(min=0).sum())


def singular_values(f: Factors) -> Tensor:
    """Return the singular values of `b @ a`, descending: (min(r, out, in),). float64."""
    values: Tensor = torch.linalg.svdvals(_core(f))
    return values


def norm(f: Factors) -> float:
    """Return the Frobenius norm of `b @ a`.

    Computed from triangular factors, not from Gram matrices: a trace of Gram matrices is a difference of squares if
    terms cancel, and would leave noise of 1e-8 of the terms instead of 1e-16.
    """
    return float(torch.linalg.matrix_norm(_core(f)))


def inner(f: Factors, g: Factors) -> float:
    """Return the Frobenius inner product of two deltas, `sum((b_f @ a_f) * (b_g @ a_g))`, in O((out + in) r_f r_g)."""
    if (f.out_features, f.in_features) != (g.out_features, g.in_features):
        raise ValueError(f"shapes differ: {f.out_features, f.in_features} and {g.out_features, g.in_features}")
    b_f, a_f = _in_range(f)
    b_g, a_g = _in_range(g)
    return float(((b_f.mT @ b_g) * (a_f @ a_g.mT)).sum())


def truncate(svd_result: Decomposition, rank: int) -> Factors:
    """Return the factors of at most `rank` that are nearest to the delta in Frobenius norm (Eckart and Young).

    Each side gets the square root of each singular value, so b and a have equal norms, which avoids overflow and
    underflow in float16 files.
    """
    if rank < 0:
        raise ValueError(f"rank {rank} is negative")
    root = svd_result.s[:rank].sqrt()
    return Factors(b=svd_result.u[:, :rank] * root, a=root[:, None] * svd_result.vt[:rank])


def numerical_rank(s: Tensor, shape: tuple[int, int], eps: float) -> int:
    """Return how many singular values exceed `max(shape) * eps * s[0]`, and so cannot be caused by rounding.

        s: (k,) descending

    eps: 2^-8 to report the rank of factors stored in bfloat16, machine epsilon of the computation to compress without
    loss.
    """
    return int((s > max(shape) * eps * s[0]).sum()) if s.numel() else 0


def noise_of_factors(f: Factors, unit: float) -> float:
    """Return a bound on every singular value of the error in `b @ a` caused by rounding the entries of `b` and `a`.

        unit (||B||_F ||A||_2 + ||B||_2 ||A||_F), of the balanced factors

    Each entry may be off by `unit` times itself, so the errors are E_B and E_A with ||E_B||_2 <= unit ||B||_F. The
    bound of `numerical_rank` is for the entries of a dense matrix, and exceeds the largest singular value as soon as a
    side is as long as 1 / unit: 256 for bfloat16.

    unit: the largest relative error of an entry, 2^-8 for bfloat16.
    """
    # Columns of b are made as long as rows of a: scaling one against the other changes neither delta nor errors.
    b, a = _in_range(f)
    length_b, length_a = (torch.linalg.vector_norm(x, dim=dim) for x, dim in ((b, 0), (a, 1)))
    present = (length_b > 0) & (length_a > 0)
    b, a, length_b, length_a = b[:, present], a[present], length_b[present], length_a[present]
    if not b.numel() or not a.numel():
        return 0.0
    balance = (length_a / length_b).sqrt()
    b, a = b * balance, a / balance[:, None]
    norms = [
        (float(torch.linalg.matrix_norm(x)), float(torch.linalg.matrix_norm(g, 2)) ** 0.5)
        for x, g in ((b, b.mT @ b), (a, a @ a.mT))
    ]
    (b_all, b_largest), (a_all, a_largest) = norms
    bound: float = unit * (b_all * a_largest + b_largest * a_all)
    return bound


def fix_signs(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, s, vt with the entry of largest magnitude in each column of u positive, the first one on ties.

    Singular vectors are only determined up to a common sign, which libraries choose arbitrarily.
    """
    if u.numel() == 0:
        return u, s, vt
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vt * sign[:, None]


# Between these limits, no product or square of float64 numbers overflows or underflows. All float32 numbers are between
# them.
_SMALL, _LARGE = 1e-75, 1e75


def _in_range(f: Factors) -> tuple[Tensor, Tensor]:
    """Return b and a in float64, such that none of their products overflows or underflows."""
    b, a = f.b.double(), f.a.double()
    largest = [max(-float(low), float(high)) for x in (b, a) if x.numel() for low, high in [x.aminmax()]]
    return (b, a) if all(_SMALL < x < _LARGE for x in largest) else _balanced(b, a)


def _balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return b and a with columns of b as large as rows of a. A term with a zero factor becomes zero on both sides."""
    # Largest entries and not Euclidean norms, whose squares would lose the range that is to be kept.
    size_b, size_a = b.abs().amax(dim=0), a.abs().amax(dim=1)
    target = size_b.sqrt() * size_a.sqrt()
    size_b, size_a = (torch.where(size > 0, size, 1.0) for size in (size_b, size_a))
    return b / size_b * target, a / size_a[:, None] * target[:, None]


def _core(f: Factors) -> Tensor:
    """Return a matrix with the singular values of `b @ a` and no side longer than r."""
    b, a = _in_range(f)
    r_b: Tensor = torch.linalg.qr(b, mode="r").R
    r_a: Tensor = torch.linalg.qr(a.mT, mode="r").R
    return r_b @ r_a.mT
