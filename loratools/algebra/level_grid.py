"""The values that the packed numbers of a weight can take while its scales stay as they are stored.

A merge that quantises again keeps scales, zero points and groups: an update is small beside the steps of the grid, so
that new scales would move every weight of a group by more than the update does. What lies beyond the end of its grid
becomes the end.
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


# How many levels to each side are looked at; of 256 levels, bfloat16 tells only about every second apart.
# Twice the unit roundoff of bfloat16, the coarsest dtype that a level is rounded to.
_SLACK = 2.0**-7
_REACH, _REACH_OF_MANY, _FEW_LEVELS = 1, 3, 64


class Neighbours(NamedTuple):
    """The levels next to some values, below and above, and what they are worth; the same level twice beyond an end."""

    low_level: Integers
    high_level: Integers
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """A few levels for every value of some rows, each worth `(level - zero) * scale * factor + offset` there.

    Attributes:
        values: What each code means before it is scaled, by code: (codes,). Several codes may mean the same.
        allowed: The codes that may be written; a code of no number is not among them.
        current: The codes that are stored now, in the shape of the rows.
        scale, zero, offset: One number for each value, or shapes that broadcast to that; None if there is none.
        factor: One more, by which the product with the scale is multiplied.
        dtype: What the value is rounded to; before the offset is added as well.
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
        """The values that levels stand for, exactly as they are dequantised."""
        values: Floats = levels if self.zero is None else levels - self.zero
        values = values * self.scale
        if self.factor is not None:
            values *= np.float32(self.factor)
        if self.offset is not None:
            values = onto_grid(values, self.dtype) + self.offset
        return onto_grid(values.astype(np.float32, copy=False), self.dtype)

    def stored(self) -> Floats:
        """What the codes that are stored now stand for."""
        return self.worth(self.values[self.current])

    def cell_variance(self) -> Floats:
        """The mean squared error of numbers that were rounded to the stored values, in the shape of the rows.

        Such a number may lie anywhere in the cell of its level, which reaches half the way to the levels beside it; the
        cell of the first and of the last level ends there.
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
        # A scale may be negative, and values are rounded, so that several of many levels may be worth the same: the
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
            # What is stored may have a code that is not written anew, and stays where nothing moves it.
            stored = self.stored()
            low, high = np.where(exact == stored, stored, low), np.where(exact == stored, stored, high)
        return Neighbours(low_level, high_level, low, high)

    def may_leave(self, stored: Floats, moved: Floats) -> Mask:
        """Where a value that moves by so much from what is stored may come to be nearest to another level.

        Elsewhere it is surely nearest to the level that it is at. Of levels that lie close together everything may.

        Args:
            stored: What `stored` gives, which the caller has already.
            moved: How far each moves, in the same shape.
        """
        levels, _ = self._levels
        at = np.searchsorted(levels, self.values.astype(np.float32))
        inner = np.diff(levels, prepend=-np.inf, append=np.inf)
        gaps = np.minimum(inner[:-1], inner[1:])[np.clip(at, 0, len(levels) - 1)].astype(np.float32)
        # A code that is not written anew may stand for a value between two levels.
        gaps[~np.isin(self.values, levels)] = 0
        scale = np.abs(self.scale if self.factor is None else self.scale * np.float32(self.factor))
        gap = gaps[self.current] * scale
        # What rounding to the dtype, and the sum, may have moved the level and the ones beside it by.
        slack = np.float32(_SLACK) * (np.abs(stored) + gap)
        if self.offset is not None:
            slack += np.float32(_SLACK) * np.abs(self.offset)
        certain: Mask = np.abs(moved) < np.float32(0.5) * gap - slack
        return ~certain

    def at(self, places: Mask) -> LevelGrid:
        """The grid of some of its values alone, as one row of them."""

        def at_places(numbers: Floats | None) -> Floats | None:
            return None if numbers is None else np.broadcast_to(numbers, self.current.shape)[places]

        scale = at_places(self.scale)
        assert scale is not None
        return replace(
            self, current=self.current[places], scale=scale, zero=at_places(self.zero), offset=at_places(self.offset)
        )

    def codes(self, neighbours: Neighbours, upper: Mask) -> tuple[Integers, Floats]:
        """The codes of the chosen neighbours, and their values. A code that means the same already stays."""
        _, codes = self._levels
        values = np.where(upper, neighbours.high, neighbours.low)
        chosen = codes[np.where(upper, neighbours.high_level, neighbours.low_level)]
        unchanged = values == self.stored()
        return np.where(unchanged, self.current, chosen).astype(self.current.dtype), values

    @cached_property
    def _levels(self) -> tuple[Floats, Integers]:
        """Levels in increasing order, and a code of each."""
        levels, first = np.unique(self.values[self.allowed], return_index=True)
        return levels.astype(np.float32), self.allowed[first]

    def _unscaled(self, values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = self.scale if self.factor is None else self.scale * np.float32(self.factor)
            levels = (values if self.offset is None else values - self.offset) / scale
        levels = np.where(np.isfinite(levels), levels, 0)
        return levels if self.zero is None else levels + self.zero
