"""FactorDelta: the rows of `b @ a`, which is what every low-rank kind comes down to when it is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class FactorDelta:
    """`b: (rows, rank)`, `a: (rank, columns)`; scale and weight are in `b`."""

    b: Tensor
    a: Tensor

    @property
    def terms(self) -> int:
        return int(self.a.shape[0])

    def rows(self, start: int, stop: int, *, out: Tensor | None = None) -> Tensor:
        import torch

        return torch.mm(self.b[start:stop], self.a, out=out)

    def magnitude(self, start: int, stop: int) -> Tensor:
        return self.b[start:stop].abs() @ self.a.abs()


def joined(deltas: Sequence[FactorDelta]) -> FactorDelta:
    """The sum of several, as one pair of factors: one matrix product, and one accumulation, for all adapters."""
    import torch

    if len(deltas) == 1:
        return deltas[0]
    return FactorDelta(torch.cat([d.b for d in deltas], dim=1), torch.cat([d.a for d in deltas], dim=0))
