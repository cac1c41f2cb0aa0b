"""FactorDelta: the rows of `b @ a`, which is what every low-rank kind comes down to when it is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


@dataclass(frozen=True, eq=False)
class FactorDelta:
    """`b: (rows, rank)`, `a: (rank, columns)`; scale and weight are in `b`."""

    b: Floats
    a: Floats

    @property
    def terms(self) -> int:
        return int(self.a.shape[0])

    def rows(self, start: int, stop: int, *, out: Floats | None = None) -> Floats:
        import numpy as np

        return np.matmul(self.b[start:stop], self.a, out=out)

    def energy(self, start: int, stop: int) -> float:
        import numpy as np

        # |b a|^2 = <b'b, a a'>: two small squares in place of a pass over every entry.
        b = self.b[start:stop].astype(np.float64)
        return float(np.vdot(b.T @ b, self._square_of_a))

    @cached_property
    def _square_of_a(self) -> Floats:
        import numpy as np

        a = self.a.astype(np.float64)
        square: Floats = a @ a.T
        return square

    def magnitude(self, start: int, stop: int) -> Floats:
        product: Floats = abs(self.b[start:stop]) @ abs(self.a)
        return product


def joined(deltas: Sequence[FactorDelta]) -> FactorDelta:
    """The sum of several, as one pair of factors: one matrix product, and one accumulation, for all adapters."""
    import numpy as np

    if len(deltas) == 1:
        return deltas[0]
    return FactorDelta(np.concatenate([d.b for d in deltas], axis=1), np.concatenate([d.a for d in deltas], axis=0))
