"""The values that the packed codes of a weight can represent while its scales stay as they are stored.

A merge that quantises again keeps scales, zero points and groups: an update is small compared with the steps of the
grid, so new scales would move every weight of a group by more than the update does. Values beyond the end of the grid
are clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loratools.algebra.packing import onto_grid

if TYPE_CHECKING:
    from loratools.algebra.neighbours import Mask
    from loratools.algebra.packing import Integers
    from loratools.algebra.rounding import Floats


# How many levels on each side are examined. Among 256 levels, bfloat16 only distinguishes about every second one. Twice
# the unit roundoff of bfloat16, the coarsest dtype that a level is rounded to.
_SLACK = 2.0**-7
_REACH, _REACH_OF_MANY, _FEW_LEVELS = 1, 3, 64


class Neighbours(NamedTuple):
    """The levels next to some values, below and above, and their values; beyond an end, the same level twice."""

    low_level: Integers
    high_level: Integers
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """The quantisation levels for every value of some rows: each stands for `(level - zero) * scale * factor + offset`.

    Attributes:
        values: The unscaled value of each code: (codes,). Several codes may have the same value.
        allowed: The codes that may be written, without codes that stand for no number.
        current: The codes that are stored now, in the shape of the rows.
        scale, zero, offset: One number for each value, or shapes that broadcast to that; None if the scheme has none.
        factor: A further factor of the scale.
        dtype: The dtype that a value is rounded to, before the offset is added as well.
    """

    values: Floats
    allowed: Integers
    current: Integers
    scale: Floats
    dtype: str
    zero: Floats | None = None
    offset: Floats | None = None
    factor: float | None = None

    def worth(self, levels: Floats) -> Floats:
        """The values of levels, exactly as they are dequantised."""
        values: Floats = levels if self.zero is None else levels - self.zero
        values = values * self.scale
        if self.factor is not None:
            values *= np.float32(self.factor)
        if self.offset is not None:
            values = onto_grid(values, self.dtype) + self.offset
        return onto_grid(values.astype(np.float32, copy=False), self.dtype)

    def stored(self) -> Floats:
        """The values of the codes that are stored now."""
        return self.worth(self.values[self.current])

    def cell_variance(self) -> Floats:
        """The mean squared rounding error of the stored values, in the shape of the rows.

        The original number may lie anywhere in the cell of its level, which reaches half the way to the levels next to
        it. The cells of the first and of the last level end at that level.
        """
        levels, _ = self._levels
        at = np.searchsorted(levels, self.values[self.current].astype(np.float32))
        centre = self.worth(levels[np.clip(at, 0, len(levels) - 1)])
        neighbours = [self.worth(levels[np.clip(at + step, 0, len(levels) - 1)]) for step in (-1, 1)]
        below, above = (np.abs(worth - centre) / 2 for worth in neighbours)
        width = below + above
        variance: Floats = (below**3 + above**3) / (3 * np.where(width > 0, width, 1))
        return variance

    def neighbours(self, exact: Floats) -> Neighbours:
        """The levels between which values lie."""
        levels, _ = self._levels
        near = np.searchsorted((levels[1:] + levels[:-1]) / 2, self._unscaled(exact).astype(np.float32))
        low = np.full(exact.shape, -np.inf, np.float32)
        high = np.full(exact.shape, np.inf, np.float32)
        low_level, high_level = np.zeros(exact.shape, np.int16), np.zeros(exact.shape, np.int16)
        # A scale may be negative, and values are rounded, so that several levels may have the same value. The
        # neighbours are among the levels around the one that is nearest before rounding.
        reach = _REACH if len(levels) <= _FEW_LEVELS else _REACH_OF_MANY
        for step in sorted(range(-reach, reach + 1), key=abs):
            level = np.clip(near + step, 0, len(levels) - 1)
            worth = self.worth(levels[level])
            below = (worth <= exact) & (worth > low)
            above = (worth >= exact) & (worth < high)
            low, low_level = np.where(below, worth, low), np.where(below, level, low_level)
            high, high_level = np.where(above, worth, high), np.where(above, level, high_level)
        under, over = np.isinf(low), np.isinf(high)
        low, low_level = np.where(under, high, low), np.where(under, high_level, low_level)
        high, high_level = np.where(over, low, high), np.where(over, low_level, high_level)
        if len(self.allowed) < len(self.values):
            # A stored code that may not be written anew stays if its value does not change.
            stored = self.stored()
            low, high = np.where(exact == stored, stored, low), np.where(exact == stored, stored, high)
        return Neighbours(low_level, high_level, low, high)

    def may_leave(self, stored: Floats, moved: Floats) -> Mask:
        """Where a value that moves by `moved` from the stored one may become nearest to another level.

        Elsewhere it is certainly nearest to its present level. If levels lie close together, every value may change.

        Args:
            stored: The result of `stored`, which the caller has already.
            moved: How far each moves, in the same shape.
        """
        levels, _ = self._levels
        at = np.searchsorted(levels, self.values.astype(np.float32))
        inner = np.diff(levels, prepend=-np.inf, append=np.inf)
        gaps = np.minimum(inner[:-1], inner[1:])[np.clip(at, 0, len(levels) - 1)].astype(np.float32)
        # A code that may not be written anew may stand for a value between two levels.
        gaps[~np.isin(self.values, levels)] = 0
        scale = np.abs(self.scale if self.factor is None else self.scale * np.float32(self.factor))
        gap = gaps[self.current] * scale
        # How far rounding to the dtype, and the sum, may have moved the level and its neighbours.
        slack = np.float32(_SLACK) * (np.abs(stored) + gap)
        if self.offset is not None:
            slack += np.float32(_SLACK) * np.abs(self.offset)
        certain: Mask = np.abs(moved) < np.float32(0.5) * gap - slack
        return ~certain

    def at(self, places: Mask) -> LevelGrid:
        """The grid of some of its values only, as one row."""

        def at_places(numbers: Floats | None) -> Floats | None:
            return None if numbers is None else np.broadcast_to(numbers, self.current.shape)[places]

        scale = at_places(self.scale)
        assert scale is not None
        return replace(
            self, current=self.current[places], scale=scale, zero=at_places(self.zero), offset=at_places(self.offset)
        )

    def codes(self, neighbours: Neighbours, upper: Mask) -> tuple[Integers, Floats]:
        """The codes of the chosen neighbours, and their values. A code that already has the same value stays."""
        _, codes = self._levels
        values = np.where(upper, neighbours.high, neighbours.low)
        chosen = codes[np.where(upper, neighbours.high_level, neighbours.low_level)]
        unchanged = values == self.stored()
        return np.where(unchanged, self.current, chosen).astype(self.current.dtype), values

    @cached_property
    def _levels(self) -> tuple[Floats, Integers]:
        """Levels in increasing order, and a code for each."""
        levels, first = np.unique(self.values[self.allowed], return_index=True)
        return levels.astype(np.float32), self.allowed[first]

    def _unscaled(self, values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = self.scale if self.factor is None else self.scale * np.float32(self.factor)
            levels = (values if self.offset is None else values - self.offset) / scale
        levels = np.where(np.isfinite(levels), levels, 0)
        return levels if self.zero is None else levels + self.zero
