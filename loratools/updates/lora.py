"""LoRA: `dW = scale * B @ A`, on a weight of shape (out, in).

Hu et al., 2021, https://arxiv.org/abs/2106.09685. With rsLoRA (Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732) the scale is alpha / sqrt(rank) in place of alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors import LazyTensor
from loratools.updates._factored import FactorDelta

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors


@dataclass(frozen=True)
class LoRA:
    """`a: (rank, in)`, `b: (out, rank)`. The rank is the tensors'; alpha is kept as stored, since
    `(alpha / rank) * rank` is not always alpha in floating point."""

    kind: ClassVar[str] = "lora"

    a: LazyTensor
    b: LazyTensor
    alpha: float
    alpha_source: str
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def scale(self) -> float:
        # A module of rank 0 (nothing changed there) has no scale to speak of.
        if self.rank == 0:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b}

    def factors(self) -> Factors:
        from loratools.algebra.lowrank import Factors

        return Factors(self.b.read().double() * self.scale, self.a.read().double())

    def prepare(self, *, transposed: bool, weight: float, dtype: str) -> FactorDelta:
        import numpy as np

        # The constant meets B in float64, so that B is rounded once and not once more for the constant itself.
        a = read_array(self.a, dtype)
        b = (read_array(self.b, "F64") * (self.scale * weight)).astype(a.dtype)
        if transposed:
            return FactorDelta(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
        return FactorDelta(b, a)
