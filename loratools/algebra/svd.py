"""Truncated singular value decomposition of a dense delta, with a certificate.

Randomised block Krylov iteration (Musco and Musco, NeurIPS 2015) on the left: from a Gaussian block, the basis Q of
span{D X, D D^T D X, ...} grows by one orthonormal block a step, and W = D^T Q is kept as it goes. Then Q W^T is the
projection of D on Q:

- its singular values s never exceed those of D, so `sum s^2` is a lower bound of what the best decomposition of that
  rank captures;
- `||D - u s vt||^2 = ||D||^2 - sum s^2` exactly (Pythagoras), so the error costs nothing but one sum of squares;
- `||D - Q Q^T D||^2 = ||D||^2 - ||W||^2` bounds what any decomposition could capture beyond it (Ky Fan).

Why Krylov and not subspace iteration: both read D twice a step, but keeping the blocks reaches a flat spectrum in the
square root of the steps, and fine-tunes are flat: a few dozen directions over the white noise of bfloat16 rounding.

Everything large is one of two products, D X and Q^T D, in float32. Blocks are made orthonormal from Grams in float64
("SVQB", Stathopoulos and Wu, SIAM J. Sci. Comput. 2002), twice: as fast as CholeskyQR, but it reveals rank, so that a
rank-deficient delta drops directions where a Cholesky factorisation would break down.

Factors (for which `algebra.lowrank` is exact), dtypes of files, and threads are not known here. Callers who need the
same bytes everywhere run it on one thread: the order of sums inside a matrix product depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratools.algebra.lowrank import fix_signs
from loratools.algebra.rank_rules import Fixed, RankRule, scaled

# With fewer rows or columns per column of the block than this, the exact method is as fast (measured: 9 to 11, AVX-512,
# one thread).
_EXACT_BELOW_BLOCKS = 10
# ... and below this many at any rank.
_EXACT_BELOW = 192
# Oversampling: the block is the rank plus at least this, rounded up to a multiple that matrix kernels handle well.
_OVERSAMPLING = 8
_BLOCK_MULTIPLE = 16
# For extrapolation, the gain of a singular value is assumed to fall by no more than this factor per step.
_SLOWEST_TRUSTED_RATIO = 0.2
# Directions of a new block below this share of the largest singular value are rounding noise of float32 products.
_NOISE = 1e-6
# Above this captured share, `1 - energy` has lost too many digits of float32 sums, and the residual is formed.
_DIRECT_RESIDUAL_ABOVE = 1 - 1e-3
# ... and at most this, unless the exact way is near. Smaller blocks take more steps to a basis that is as good, and a
# basis of fewer columns for it (Chen, Epperly, Meyer, Musco and Rao, 2025): at rank 128, half the time of 144 columns.
_BLOCK_AT_MOST = 64
# The block size if a rule chooses the rank: the basis grows until the rule can decide.
_BLOCK_OF_RULES = 32
# A rule that cannot decide on a basis of this share of the smaller side will not decide on a small one.
_GIVE_UP = 1 / 3
# Elements per piece where a float64 copy of the whole would double the memory; fits in the second-level cache.
_PIECE = 1 << 17


@dataclass(frozen=True)
class TruncatedSvd:
    """A truncated singular value decomposition of a delta, with its measured error.

    `delta` is approximately `u @ diag(s) @ vt`; the fields below say how accurately, and how close to the optimum.

        u: (m, k)   s: (k,) descending   vt: (k, n)

    values: the computed singular values, (at least k,) descending, float64: those beyond k are lower
        bounds, and crude ones at the end, unless the method is an exact one.

    u and vt are float32 and orthonormal, the largest entry of each column of u is positive. s is float64, as singular
    values of a float32 matrix may be out of the range of float32.

    norm: ||delta|| (Frobenius).
    energy: sum s^2 / ||delta||^2, the captured share; no more than the best decomposition of this rank captures (to
        1e-7, from float32 products).
    error: ||delta - u s vt|| / ||delta||, of u, s, vt as they are here.
    gap_bound: `optimal energy - energy` is at most this. Always true (to rounding), and mostly far too large: it
        allows for all that lies outside of the space searched to be one direction. 0 from the exact methods.
    gap_estimate: what `optimal energy - energy` probably is, extrapolated from the last steps; no proof. A share of
        ||delta||^2 like the others.
    passes: how many times delta was read to be multiplied.
    method: "krylov", "gram" (exact, eigenvectors of a float64 Gram), "dense" (exact, LAPACK in float64) or "zero".
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    values: Tensor
    norm: float
    energy: float
    error: float
    gap_bound: float
    gap_estimate: float
    passes: int
    method: str


def truncated_svd(
    delta: Tensor, rank: int | RankRule, *, tolerance: float = 5e-5, seed: int = 0, exact: bool = False
) -> TruncatedSvd:
    """Return the decomposition of `rank` that captures all but about `tolerance` of what the best one captures.

        delta: (m, n)

    The rank is limited to min(m, n). If it is not small compared with that, the result is exact.

    rank: a number, or a rule that chooses it as singular values are found. A rule's rank is 1 at least, since it is
        asked of lower bounds: it is never below the one that exact singular values would give, and at most a few
        hundredths above.
    tolerance: the largest `gap_estimate / energy` to stop at.
        Buys: the least captured share of the optimum, over power laws from i^-0.3, exponentials, white noise, and
        spikes of all heights over white noise, n from 256 to 2048, rank 4 to 64, was 0.9986 at 1e-3, 0.9992 at 5e-4,
        0.99993 at 5e-5, 0.99997 at 2e-5. Mostly much more is captured: steps are coarse. Costs: two passes a step;
        against the default 0.66 of the passes at 1e-3, 1.14 at 2e-5. Try first: the default, which keeps 0.9999.
    seed: of the Gaussian start. Equal input, seed and thread count give equal bytes.
    exact: no randomised method, whatever the size. Also keeps singular values below 1e-6 of the largest accurate.
        Buys: gap 0. Costs: some 0.1 s at 1024 columns and the cube of that beyond. Try first: leave it off.

    Raises:
        ValueError: Delta has NaN or infinite values.
    """
    if delta.ndim != 2:
        raise ValueError(f"delta has {delta.ndim} axes; a matrix has 2")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank {rank} is not positive")
    delta = delta.detach()
    if delta.dtype != torch.float32:
        delta = delta.float()
    m, n = delta.shape
    rule: RankRule = Fixed(min(rank, m, n)) if isinstance(rank, int) else rank
    norm = math.sqrt(_sum_of_squares(delta))
    if not math.isfinite(norm):
        raise ValueError("delta holds NaN or infinity")
    if norm == 0:
        return _zero(delta, rule.count if isinstance(rule, Fixed) else 1)

    # A power of two, so that scaling is exact; float32 products of 1e-30 or 1e30 would not be. Most deltas need no
    # copy.
    shift = 0 if 2.0**-40 < norm < 2.0**40 else -math.frexp(norm)[1]
    if shift:
        delta = _times_power_of_two(delta, shift)
    scale = 2.0**shift
    rule = scaled(rule, scale)
    columns = rule.count + _OVERSAMPLING if isinstance(rule, Fixed) else _BLOCK_OF_RULES
    block = -(-min(columns, _BLOCK_AT_MOST) // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE
    smaller = min(m, n)
    decomposition: _ScaledSvd | None = None
    if not exact and smaller > max(_EXACT_BELOW, _EXACT_BELOW_BLOCKS * block):
        decomposition = _krylov(delta, rule, block, norm * scale, tolerance, seed)
    if decomposition is None:
        decomposition = _exact(delta, rule, norm * scale, careful=exact)
    return _finish(delta, decomposition, norm, shift)


def truncated_svds(
    deltas: Tensor, rank: int | RankRule, *, tolerance: float = 5e-5, seed: int = 0, exact: bool = False
) -> list[TruncatedSvd]:
    """Return `truncated_svd` of each matrix of a stack, (count, m, n), processing all small ones in the same calls.

    Decomposing a matrix of a few hundred columns takes less time than launching the operations.
    """
    count, m, n = deltas.shape
    if exact or min(m, n) > _EXACT_BELOW or count < 2:
        return [truncated_svd(delta, rank, tolerance=tolerance, seed=seed, exact=exact) for delta in deltas]
    if m < n:
        flipped = truncated_svds(deltas.mT, rank)
        return [_transposed(results) for results in flipped]
    results: list[TruncatedSvd] = []
    for batch in _pieces(deltas.detach(), max(1, 8 * _PIECE // (m * n))):
        results += _exact_together(batch.float(), rank)
    return results


def _transposed(svd: TruncatedSvd) -> TruncatedSvd:
    u, s, vt = fix_signs(svd.vt.mT, svd.s, svd.u.mT)
    return replace(svd, u=u.contiguous(), s=s, vt=vt.contiguous())


def _exact_together(deltas: Tensor, rank: int | RankRule) -> list[TruncatedSvd]:
    """Like `_exact`, for small matrices (count, m, n) with m >= n."""
    n = deltas.shape[2]
    wide = deltas.double()
    squares_of_norms = wide.square().sum((1, 2)).tolist()
    if not all(map(math.isfinite, squares_of_norms)):
        raise ValueError("delta holds NaN or infinity")
    # Powers of two, so that scaling is exact.
    shifts = [-math.frexp(math.sqrt(square))[1] if square else 0 for square in squares_of_norms]
    wide = torch.ldexp(wide, torch.tensor(shifts, device=wide.device).view(-1, 1, 1))
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)
    squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)
    results: list[TruncatedSvd] = []
    rule: RankRule = Fixed(min(rank, n)) if isinstance(rank, int) else rank
    rules = [scaled(rule, 2.0**shift) for shift in shifts]
    norms = [math.ldexp(math.sqrt(square), shift) for square, shift in zip(squares_of_norms, shifts, strict=True)]
    on_cpu = squares.cpu()
    ranks = [_exact_rank(r, s, norm, n) for r, s, norm in zip(rules, on_cpu, norms, strict=True)]
    largest = max(ranks)
    q_image, r_image = torch.linalg.qr(wide @ vectors[:, :, :largest])
    p, s, zt = torch.linalg.svd(r_image)
    u, vt = q_image @ p, zt @ vectors[:, :, :largest].mT
    for i, (k, shift) in enumerate(zip(ranks, shifts, strict=True)):
        if not squares_of_norms[i]:
            results.append(_zero(deltas[i], k if isinstance(rank, int) else 1))
            continue
        decomposition = _ScaledSvd(u[i, :, :k], s[i, :k], vt[i, :k], squares[i].sqrt(), 0.0, 0.0, 2, "gram")
        scaled_delta = _times_power_of_two(deltas[i], shift)
        results.append(_finish(scaled_delta, decomposition, math.sqrt(squares_of_norms[i]), shift))
    return results


@dataclass(frozen=True)
class _ScaledSvd:
    """u, s, vt of the scaled delta in float64, and how they were computed."""

    u: Tensor
    s: Tensor
    vt: Tensor
    values: Tensor
    gap_bound: float
    gap_estimate: float
    passes: int
    method: str


def _krylov(delta: Tensor, rule: RankRule, block: int, norm: float, tolerance: float, seed: int) -> _ScaledSvd | None:
    """Return the Ritz decomposition once its energy has converged, or None once the basis is no longer small."""
    m, n = delta.shape
    total = norm * norm
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        # Drawn on the CPU, so that a seed means the same on every device.
        return torch.randn(n, block, generator=generator).to(delta.device)

    gram = torch.zeros(0, 0, dtype=torch.float64, device=delta.device)
    q = _Rows(m, 4 * block, like=delta)
    # float64, so that each block is converted once and not again for every Gram.
    w = _Rows(n, 4 * block, like=gram)
    history: list[Tensor] = []
    x = random()
    passes = 0
    restarted = proven = False
    most = 3 * min(m, n) // 4
    # The loop always ends: each turn extends the basis, until it is no longer small.
    while True:
        fresh = _orthonormal_rows(delta @ x, q.filled(), _NOISE * float(history[-1][0].sqrt()) if history else 0.0)
        passes += 1
        exhausted = fresh.shape[0] == 0
        if not exhausted:
            q.append(fresh)
            image = fresh @ delta
            passes += 1
            w.append(image)
            gram = _grown_gram(gram, w.filled())
            history.append(torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu())
        squares = history[-1]
        # Nothing new: either Q spans the whole range of delta, and the projection is delta itself; or delta has so few
        # distinct singular values that it maps the searched space to itself. In that case there are more directions for
        # each value, and a fresh start finds them.
        if exhausted and float(squares.sum()) < (1 - _NOISE) * total:
            if restarted or q.count + block > most:
                return None
            restarted = True
            x = random()
            continue
        restarted = False
        k = rule.rank(squares, total, complete=exhausted)
        gap = 0.0
        if k is not None and not exhausted:
            missing = _extrapolated_gaps(history)
            gap = float(missing[:k].sum())
            if gap > tolerance * float(squares[:k].sum()) or _may_do_with_less(rule, squares + missing, total, k):
                k = None
        if k is not None and (exhausted or proven or k <= block):
            break
        # If more singular values are equal than a block has columns, a Krylov space contains one direction for each
        # column, and has converged without the others. A fresh start would find them; the estimate must cover its gain.
        proven = k is not None
        if q.count + block > _most_rows(rule, squares, total, min(m, n)):
            return None
        x = random() if proven else _well_conditioned(image.mT)
    bound = max(0.0, total - float(gram.diagonal().sum())) / total
    k = max(1, min(k, m, n))
    u, s, vt = _ritz(q.filled(), w.filled(), gram, k)
    return _ScaledSvd(
        u, s, vt, squares.sqrt(), gap_bound=bound, gap_estimate=min(gap / total, bound), passes=passes, method="krylov"
    )


def _may_do_with_less(rule: RankRule, squares: Tensor, total: float, k: int) -> bool:
    """Whether the rule would choose a much different rank for the extrapolated singular values."""
    if isinstance(rule, Fixed):
        return False
    later = rule.rank(squares.sort(descending=True).values, total, complete=False)
    return later is None or abs(k - later) > k // 32


def _most_rows(rule: RankRule, squares: Tensor, total: float, smaller: int) -> float:
    """The number of basis rows at which the exact method is cheaper, or will be before the rule can decide."""
    if isinstance(rule, Fixed):
        return 3 * smaller / 4
    trusted = len(squares) // 2
    if rule.rank(squares, total, complete=False) is None:
        # Assume that every missing singular value is as large as one in the middle, which has mostly converged.
        imagined = torch.cat([squares[:trusted], squares[trusted].expand(int(_GIVE_UP * smaller))])
        if rule.rank(imagined, total, complete=False) is None:
            return 0
    return _GIVE_UP * smaller


def _extrapolated_gaps(history: list[Tensor]) -> Tensor:
    """Return the energy that further steps would probably still gain in each singular value.

        history: the squared singular values after each step so far, of which there are more each time

    Each singular value is extrapolated on its own, as a geometric series with the ratio of its last two gains: a few
    large ones that have long converged say nothing about the small ones. Ratios have a lower limit, since a gain can be
    small by accident.
    """
    last = history[-1]
    if len(history) < 3:
        return torch.full_like(last, math.inf)
    earlier, before = (torch.nn.functional.pad(h, (0, len(last) - len(h))) for h in history[-3:-1])
    gained, gain = (before - earlier).clamp(min=0), (last - before).clamp(min=0)
    ratio = torch.where(gained > 0, gain / gained, 1.0).clamp(_SLOWEST_TRUSTED_RATIO, 0.9)
    return gain * ratio / (1 - ratio)


def _ritz(q: Tensor, w: Tensor, gram: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k leading singular triplets of the projection Q W^T, in float64.

    q: (basis, m) orthonormal rows   w: (basis, n)   gram: w @ w^T in float64
    """
    leading = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :k]
    # From a thin QR of W P and not from the eigenvalues: small singular values and their vectors keep digits that
    # squaring loses.
    basis = (leading.mT.to(q.dtype) @ q).double().mT
    image = (leading.mT @ w).mT
    if leading.shape[1] < k:
        # The rank of delta is below k: any orthonormal directions serve, with singular values of zero.
        extra = k - leading.shape[1]
        basis = torch.cat([basis, _complement(basis, extra)], dim=1)
        image = torch.cat([image, image.new_zeros(image.shape[0], extra)], dim=1)
    q_image, r_image = torch.linalg.qr(image)
    p, s, zt = torch.linalg.svd(r_image.mT)
    u = basis @ p
    # One Newton step to the nearest orthonormal matrix: Q is orthonormal to float32 only.
    u = 1.5 * u - 0.5 * (u @ (u.mT @ u))
    return u, s, zt @ q_image.mT


def _complement(basis: Tensor, extra: int) -> Tensor:
    """Return `extra` orthonormal columns that are orthogonal to the orthonormal columns of basis: (m, basis)."""
    m, have = basis.shape
    padding = torch.eye(m, extra, dtype=basis.dtype, device=basis.device)
    completed: Tensor = torch.linalg.qr(torch.cat([basis, padding], dim=1)).Q
    return completed[:, have:]


def _exact(delta: Tensor, rule: RankRule, norm: float, *, careful: bool) -> _ScaledSvd:
    """Return the decomposition from the eigenvectors of the Gram of the smaller side, in float64.

    A Gram matrix squares the condition number: singular values below 1e-8 of the largest are noise in it. Their energy
    is negligible (1e-16). If they are requested (`careful`), LAPACK computes them, at about twenty times the cost.
    """
    if delta.shape[0] < delta.shape[1]:
        flipped = _exact(delta.mT, rule, norm, careful=careful)
        return replace(flipped, u=flipped.vt.mT, vt=flipped.u.mT)
    n = delta.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=delta.device)
    rows = max(1, 8 * _PIECE // n)
    for piece in _pieces(delta, rows):
        wide = piece.double()
        gram.addmm_(wide.mT, wide)
    squares, vectors = torch.linalg.eigh(gram)
    squares = squares.flip(0).clamp(min=0)
    k = _exact_rank(rule, squares, norm, n)
    if careful and squares[k - 1] < 1e-12 * squares[0]:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
        k = _exact_rank(rule, s.square(), norm, n)
        return _ScaledSvd(u[:, :k], s[:k], vt[:k], s, gap_bound=0.0, gap_estimate=0.0, passes=1, method="dense")
    v = vectors.flip(1)[:, :k]
    image = torch.cat([piece.double() @ v for piece in _pieces(delta, rows)])
    q_image, r_image = torch.linalg.qr(image)
    p, s, zt = torch.linalg.svd(r_image)
    return _ScaledSvd(
        q_image @ p, s, zt @ v.mT, squares.sqrt(), gap_bound=0.0, gap_estimate=0.0, passes=2, method="gram"
    )


def _exact_rank(rule: RankRule, squares: Tensor, norm: float, n: int) -> int:
    return max(1, min(rule.rank(squares.cpu(), norm * norm, complete=True) or 0, n))


def _finish(delta: Tensor, scaled: _ScaledSvd, norm: float, shift: int) -> TruncatedSvd:
    u, s, vt = fix_signs(scaled.u, scaled.s, scaled.vt)
    u, vt = u.float(), vt.float()
    # The leading ones are known more accurately from the decomposition itself.
    values = torch.cat([s, scaled.values[len(s) :].to(s.device).clamp(max=s[-1])])
    total = math.ldexp(norm, shift) ** 2
    energy = min(1.0, float((s * s).sum()) / total)
    if energy > _DIRECT_RESIDUAL_ABOVE:
        error = math.sqrt(_residual_sum_of_squares(delta, u, s, vt) / total)
    else:
        error = math.sqrt(1 - energy)
    return TruncatedSvd(
        u=u.contiguous(),
        s=s * 2.0**-shift,
        values=values * 2.0**-shift,
        vt=vt.contiguous(),
        norm=norm,
        energy=energy,
        error=error,
        gap_bound=scaled.gap_bound,
        gap_estimate=scaled.gap_estimate,
        passes=scaled.passes,
        method=scaled.method,
    )


def _zero(delta: Tensor, k: int) -> TruncatedSvd:
    m, n = delta.shape
    return TruncatedSvd(
        u=torch.eye(m, k, device=delta.device),
        s=torch.zeros(k, dtype=torch.float64, device=delta.device),
        vt=torch.eye(k, n, device=delta.device),
        values=torch.zeros(min(m, n), dtype=torch.float64, device=delta.device),
        norm=0.0,
        energy=1.0,  # nothing was there, and nothing is lost
        error=0.0,
        gap_bound=0.0,
        gap_estimate=0.0,
        passes=0,
        method="zero",
    )


def _orthonormal_rows(y: Tensor, q: Tensor | None, noise: float) -> Tensor:
    """Return an orthonormal basis of the part of y orthogonal to q, as rows: (at most block, m).

        y: (m, block)   q: (basis, m) orthonormal rows

    Directions of length `noise` or less, or lost in the rounding of longer ones, are left out. Two rounds are enough:
    the first leaves errors of float32 rounding times the condition of y, the second is well conditioned.
    """
    for second_pass in (False, True):
        if q is not None and q.shape[0]:
            y = torch.addmm(y, q.mT, q @ y, alpha=-1)
        wide = y.double()
        rotate = _whitening(wide, 0.5 if second_pass else noise * noise)
        y = (wide @ rotate).float() if second_pass else y @ rotate.float()
    return y.mT.contiguous()


def _well_conditioned(x: Tensor) -> Tensor:
    """Return nearly orthonormal columns that span those of x: (m, at most block). They are only multiplied with a
    delta, and that product is made orthonormal.
    """
    conditioned: Tensor = x @ _whitening(x.double(), 0.0).float()
    return conditioned


def _whitening(wide: Tensor, least: float) -> Tensor:
    """Return the matrix that makes the columns of `wide` orthonormal, (block, at most block), in float64.

    Directions whose squared length is `least` or less are left out, and those lost in float32 rounding.
    """
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    # Squares: in a float32 column only parts above 1e-6 of its length carry information. There may be no columns left.
    keep = values > max([least, *(1e-12 * values[-1:]).tolist()])
    rotate: Tensor = vectors[:, keep] / values[keep].sqrt()
    return rotate


class _Rows:
    """A matrix that grows by rows in one piece of memory, so that all rows enter one matrix product."""

    def __init__(self, columns: int, capacity: int, like: Tensor) -> None:
        self._storage = torch.empty(capacity, columns, dtype=like.dtype, device=like.device)
        self.count = 0

    def filled(self) -> Tensor:
        return self._storage[: self.count]

    def append(self, rows: Tensor) -> None:
        needed = self.count + rows.shape[0]
        if needed > self._storage.shape[0]:
            grown = self._storage.new_empty(2 * needed, self._storage.shape[1])
            grown[: self.count] = self.filled()
            self._storage = grown
        self._storage[self.count : needed] = rows
        self.count = needed


def _grown_gram(gram: Tensor, w: Tensor) -> Tensor:
    """Return w @ w^T, given that of the first rows of w."""
    old = gram.shape[0]
    cross = w @ w[old:].mT
    return torch.cat([torch.cat([gram, cross[:old]], dim=1), cross.mT], dim=0)


def _pieces(x: Tensor, rows: int) -> Iterator[Tensor]:
    return (x[start : start + rows] for start in range(0, x.shape[0], rows))


def _sum_of_squares(x: Tensor) -> float:
    """Return the sum of squares, accumulated in float64, without a float64 copy of x."""
    rows = max(1, _PIECE // max(1, x.shape[1]))
    buffer = torch.empty(min(rows, x.shape[0]) * x.shape[1], dtype=torch.float64, device=x.device)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for piece in _pieces(x, rows):
        wide = buffer[: piece.numel()]
        wide.view(piece.shape).copy_(piece)
        total += torch.dot(wide, wide)
    return float(total)


def _residual_sum_of_squares(delta: Tensor, u: Tensor, s: Tensor, vt: Tensor) -> float:
    """Return ||delta - u s vt||^2, in float64 and in pieces: near rounding level, float32 would measure its
    own errors.
    """
    right = s[:, None] * vt.double()
    total = torch.zeros((), dtype=torch.float64, device=delta.device)
    rows = max(1, _PIECE // delta.shape[1])
    for piece, u_rows in zip(_pieces(delta, rows), _pieces(u, rows), strict=True):
        residual = torch.addmm(piece.double(), u_rows.double(), right, alpha=-1)
        total += torch.dot(residual.view(-1), residual.view(-1))
    return float(total)


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """Return x * 2^exponent. In two steps, since 2^exponent itself may be out of the range of float32."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)
