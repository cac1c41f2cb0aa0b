"""What each delta is multiplied with in a merged weight: sums over its values, and the least squares of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


@dataclass(frozen=True)
class Fit:
    """Sums over the values of one weight, from which the best-fit weights of its deltas follow.

    Attributes:
        gram: `<dW_i, dW_j>` for each pair of deltas.
        along: `<merged - base, dW_i>` for each delta.
        moved: `<merged - base, merged - base>`.
        merged: `<merged, merged>`.
    """

    gram: tuple[tuple[float, ...], ...]
    along: tuple[float, ...]
    moved: float
    merged: float

    @property
    def cosine(self) -> float:
        """The cosine of the change with the sum of all deltas; 0 if one of them is 0."""
        return sum(self.along) / math.sqrt(self.moved * self.energy) if self.energy > 0 and self.moved > 0 else 0.0

    def weights(self) -> tuple[float | None, ...]:
        """What each delta is multiplied with in `merged - base`, by least squares; None for a delta of zeros."""
        import numpy as np

        nonzero = [i for i, row in enumerate(self.gram) if row[i] > 0]
        if not nonzero:
            return tuple(None for _ in self.gram)
        # Of unit length, so that a delta that is far smaller than another is not taken for a multiple of it.
        lengths = np.sqrt([self.gram[i][i] for i in nonzero])
        gram = np.array([[self.gram[i][j] for j in nonzero] for i in nonzero]) / np.outer(lengths, lengths)
        solved = np.linalg.lstsq(gram, np.array([self.along[i] for i in nonzero]) / lengths, rcond=1e-10)[0] / lengths
        weights_by_number = dict(zip(nonzero, solved.tolist(), strict=True))
        return tuple(weights_by_number.get(i) for i in range(len(self.gram)))

    def uncertainties(self, error: float) -> tuple[float, ...]:
        """How far each best-fit weight may be from the true one where values have errors of that square in all.

        By the inequality of Cauchy and Schwarz, with the part of a delta that no other delta has: a bound, whatever the
        errors are. Infinite for a delta that is a sum of others, or zero.
        """
        import numpy as np

        gram = np.array(self.gram)
        lengths = np.sqrt(np.maximum(np.diag(gram), 0))
        bounds = []
        for i, length in enumerate(lengths):
            others = [j for j in range(len(lengths)) if j != i and lengths[j] > 0]
            separate = float(length) ** 2
            if others and length > 0:
                scaled = gram[np.ix_(others, others)] / np.outer(lengths[others], lengths[others])
                along = gram[others, i] / lengths[others]
                separate -= float(along @ np.linalg.lstsq(scaled, along, rcond=1e-10)[0])
            bounds.append(math.sqrt(error / separate) if separate > 0 else math.inf)
        return tuple(bounds)

    def residual(self, weights: Sequence[float | None]) -> float:
        """The square that the updates leave unexplained: `|merged - base - sum of w_i dW_i|^2`."""
        used = [w or 0.0 for w in weights]
        n = range(len(used))
        squares = sum(used[i] * used[j] * self.gram[i][j] for i in n for j in n)
        return max(0.0, self.moved - 2 * sum(used[i] * self.along[i] for i in n) + squares)

    @property
    def energy(self) -> float:
        """The square of the summed updates: `|sum of dW_i|^2`."""
        return sum(map(sum, self.gram))

    @property
    def gain(self) -> float | None:
        """The gain of the summed delta, `<merged - base, dW> / <dW, dW>`; None if it is zero."""
        return sum(self.along) / self.energy if self.energy > 0 else None

    def noise(self, dtype: str) -> float:
        """What rounding every value to `dtype` once adds to the square of a residual, at most."""
        from loratools.algebra.rounding import unit_roundoff

        return self.merged * unit_roundoff(dtype) ** 2


class Sums:
    """The sums of a `Fit`, added up over blocks."""

    def __init__(self, deltas: int) -> None:
        import numpy as np

        self._gram, self._along = np.zeros((deltas, deltas)), np.zeros(deltas)
        self._moved = self._merged = 0.0
        self.count = 0

    def add(self, base: Floats, parts: Sequence[Floats], values: Floats) -> None:
        import numpy as np

        moved = values - base
        for i, part in enumerate(parts):
            self._along[i] += float(np.vdot(moved, part))
            for j in range(i, len(parts)):
                self._gram[i, j] = self._gram[j, i] = self._gram[i, j] + float(np.vdot(part, parts[j]))
        self._moved += float(np.vdot(moved, moved))
        self._merged += float(np.vdot(values, values))
        self.count += values.size

    def fit(self, looked_at: int) -> Fit:
        """The sums, if this number of values was checked: the sampled ones represent all of them."""
        stands_for = looked_at / max(1, self.count)
        gram = tuple(map(tuple, (self._gram * stands_for).tolist()))
        along = tuple((self._along * stands_for).tolist())
        return Fit(gram, along, self._moved * stands_for, self._merged * stands_for)
