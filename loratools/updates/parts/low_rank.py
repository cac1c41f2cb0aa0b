"""What kinds share whose delta is a product of two factors that need no base, whatever the factors are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.deltas import FactorDelta
from loratools.updates.parts.protocol import Delta, Shape, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats


class LowRank(UpdateDefaults, ABC):
    """The members that kinds of low rank share.

    `matrices` makes the two factors; all else follows.
    """

    needs_base: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @abstractmethod
    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        """Return the two factors of the delta.

        `b: (rows, rank)` with the scale in it, `a: (rank, columns)`, in float64, of a weight of that shape.
        """

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None if the tensors, cut to the size of the base's weight, do not tell it."""
        import torch

        from loratools.algebra.lowrank import Factors

        rows, columns = self.shape
        if rows is None or columns is None:
            return None
        b, a = self.matrices(rows, columns)
        return Factors(torch.from_numpy(b), torch.from_numpy(a))

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        b, a = self.matrices(base.shape[0], math.prod(base.shape[1:]))
        return weighted(b, a, weight, dtype)


class HasFactors(Protocol):
    """A kind with factors A and B as fields."""

    @property
    def a(self) -> LazyTensor: ...

    @property
    def b(self) -> LazyTensor: ...


class FactorSizes:
    """The rank and the shape of kinds whose fields are A, (rank, in), and B, (out, rank)."""

    @property
    def rank(self: HasFactors) -> int:
        return self.a.shape[0]

    @property
    def shape(self: HasFactors) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


def weighted(b: Floats, a: Floats, weight: float, dtype: str) -> FactorDelta:
    """Return a delta of two factors.

    `weight * b @ a` of float64 factors, each rounded once to F32, or kept in F64.
    """
    import numpy as np

    kind = np.float64 if dtype == "F64" else np.float32
    scaled = b if weight == 1 else b * weight
    return FactorDelta(np.ascontiguousarray(scaled, kind), np.ascontiguousarray(a, kind))
