"""Rules that choose the rank at which to cut a matrix, from singular values that may be incomplete.

A step-by-step decomposition asks its rule after each step. So a rule is a function of the squares known so far, of the
sum of all squares, and of whether all squares are known. It returns None if it needs more of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loratools.algebra.lowrank import EPS, numerical_rank

# Below this share of the total, the remainder is a difference of float32 sums: only a complete spectrum can decide.
_TOLD_BY_DIFFERENCE = 1e-5
# A singular value of a float32 matrix below this share of the norm, times the root of their number, is rounding.
_ROUNDING = 1e-7


def rank_for_energy(s: Tensor, share: float, *, shape: tuple[int, int] | None = None) -> int:
    """Return the smallest k whose singular values hold at least `share` of the sum of squares.

        s: (k,) descending

    At least 1 if anything is non-zero, and 0 for a zero spectrum. A `share` of 1 means every singular value above
    rounding level: the `numerical_rank` in float64 for a matrix of `shape` (assumed square if not given). No result is
    above that rank.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} is not within 0 and 1")
    rank = numerical_rank(s, shape or (len(s), len(s)), EPS)
    # A share that is met exactly must count as met: 9 of 9 + 1 is 0.9, although 1 - 0.9 is slightly less than 1/10 in
    # floating point.
    return max(min(rank, 1), rank if share == 1 else smallest_rank(s[:rank], (1 - share) + 4 * EPS))


def rank_for_error(s: Tensor, error: float, *, shape: tuple[int, int] | None = None) -> int:
    """Return the smallest k whose relative Frobenius error, `sqrt(sum_{i>k} s_i^2 / sum s^2)`, is at most `error`.

        s: (k,) descending

    Singular values at rounding level count as zero (`numerical_rank`), so an `error` of 0 gives that rank. The result
    is 0 for a zero spectrum and for an `error` of 1 or more.
    """
    if not error >= 0:
        raise ValueError(f"error {error} is negative or not a number")
    rank = numerical_rank(s, shape or (len(s), len(s)), EPS)
    return smallest_rank(s[:rank], error * error * (1 + 4 * EPS))


def smallest_rank(s: Tensor, lost: float) -> int:
    """Return the smallest k for which `sum_{i>k} s_i^2` is at most `lost` times the sum of all squares.

        s: (k,) descending, without what is rounding

    Tails are summed from the small end, so that a share of 1e-24 differs from 0, although 1 - 1e-24 is 1.
    """
    if not s.numel() or not s[0] > 0:
        return 0
    # Divided by the largest, so that squares neither overflow nor vanish.
    squares = (s.detach().double().cpu() / float(s[0])) ** 2
    tails = squares.flip(0).cumsum(0).flip(0)
    return int((tails > lost * tails[0]).sum())


class RankRule(Protocol):
    def rank(self, squares: Tensor, total: float, *, complete: bool) -> int | None:
        """Return the rank to cut at, or None if the squares known so far cannot decide it.

        squares: (k,) float64, descending, of singular values; each at most the true one.
        total: sum of the squares of all singular values. complete: whether there are no others.
        """


@dataclass(frozen=True)
class Fixed:
    """A fixed rank."""

    count: int

    def rank(self, squares: Tensor, total: float, *, complete: bool) -> int | None:
        return self.count if complete or len(squares) >= self.count else None


@dataclass(frozen=True)
class Lost:
    """The smallest rank that loses at most this share of the squared Frobenius norm.

    The lost share is 1 - 0.95 for an energy of 0.95, and 0.1 squared for a relative error of 0.1. Singular values at
    rounding level are not kept for any share.
    """

    share: float

    @property
    def needs_all(self) -> bool:
        """Whether only a complete spectrum can decide: differences of float32 sums do not resolve so small a share."""
        return self.share < _TOLD_BY_DIFFERENCE

    def rank(self, squares: Tensor, total: float, *, complete: bool) -> int | None:
        if complete:
            # Squares from a Gram matrix may be negative by rounding.
            values = squares.clamp(min=0).sqrt()
            real = values > _ROUNDING * math.sqrt(len(values) * total)
            return smallest_rank(values[real], self.share * (1 + 1e-12))
        if self.needs_all:
            return None
        reached = squares.cumsum(0) >= (1 - self.share) * total * (1 - 1e-12)
        return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


@dataclass(frozen=True)
class Above:
    """The number of singular values above an edge, such as that of known noise."""

    edge: float

    def rank(self, squares: Tensor, total: float, *, complete: bool) -> int | None:
        count = int((squares > self.edge * self.edge).sum())
        return count if complete or count < len(squares) else None


@dataclass(frozen=True)
class AtMost:
    """A rule with a largest rank."""

    rule: RankRule
    cap: int

    def rank(self, squares: Tensor, total: float, *, complete: bool) -> int | None:
        uncapped = self.rule.rank(squares, total, complete=complete)
        if uncapped is None:
            return self.cap if len(squares) >= self.cap else None
        return min(uncapped, self.cap)


def scaled(rule: RankRule, factor: float) -> RankRule:
    """The same rule for a matrix times `factor`."""
    if isinstance(rule, Above):
        return Above(rule.edge * factor)
    if isinstance(rule, AtMost):
        return AtMost(scaled(rule.rule, factor), rule.cap)
    return rule


def lost_for_error(error: float) -> Lost:
    """The rule for a largest relative Frobenius error."""
    return Lost(error * error)


def lost_for_energy(energy: float) -> Lost:
    """The rule for a smallest share of the squared Frobenius norm."""
    return Lost(max(0.0, math.fsum((1.0, -energy))))


def named_rank(name: str, value: float, s: Tensor) -> int:
    """Return the rank by one of the rules of kohya's resize script, which need all singular values.

        s: (k,) descending

    sv_ratio        as many as are larger than the first one divided by `value`.
    sv_cumulative   the smallest rank whose sum of singular values is the share `value` of all.
    sv_fro          the smallest rank whose Frobenius norm is the share `value` of all; the energy `value` squared.

    The result is at least 1.
    """
    s = s.detach().double().cpu()
    if not s.numel() or not s[0] > 0:
        return 1
    s = s / s[0]
    if name == "sv_ratio":
        return max(1, int((s > 1 / value).sum()))
    shares = s.cumsum(0) if name == "sv_cumulative" else s.square().cumsum(0).sqrt()
    return min(len(s), int((shares < value * shares[-1] * (1 - 1e-12)).sum()) + 1)
