"""HRA: the inputs reflected once or several times, `W' = W (I - 2 u1 u1') (I - 2 u2 u2') ...`.

Yuan et al., 2024, https://arxiv.org/abs/2405.17484. The product of r reflections is I - V U' with V and U of r columns,
so that the delta is of rank r, and depends on the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import FactorDelta
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("hra_u",)
PEFT_FIELDS = ("apply_GS", "init_weights")


@dataclass(frozen=True)
class HRA(NoAlpha):
    """An HRA update: the inputs reflected once for each rank.

    Attributes:
        u: The vectors of the reflections, of any length, unread: (in x kernel, rank).
        gram_schmidt: Whether the vectors are made orthogonal one after another first.
    """

    kind: ClassVar[str] = "hra"
    needs_base: ClassVar[bool] = True

    u: LazyTensor
    gram_schmidt: bool = False

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def shape(self) -> Shape:
        return None, self.u.shape[0]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"u": self.u}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and math.prod(shape[1:]) == self.u.shape[0]

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        kind = np.float64 if dtype == "F64" else np.float32
        values = read_array(base, "F64").reshape(base.shape[0], -1)
        u = read_array(self.u, "F64")
        v, u = _orthogonalised(u) if self.gram_schmidt else _product(u)
        return FactorDelta((values @ v * -weight).astype(kind), np.ascontiguousarray(u.T, kind))


def _product(u: Floats) -> tuple[Floats, Floats]:
    """V and U whose I - V U' is the product of the reflections, in the order of the columns."""
    import numpy as np

    u = u / np.linalg.norm(u, axis=0)
    v = np.empty_like(u)
    for i in range(u.shape[1]):
        v[:, i] = 2 * (u[:, i] - v[:, :i] @ (u[:, :i].T @ u[:, i]))
    return v, u


def _orthogonalised(u: Floats) -> tuple[Floats, Floats]:
    """The same of columns made orthogonal, where the order no longer counts."""
    import numpy as np

    orthonormal = np.empty_like(u)
    for i in range(u.shape[1]):
        column = u[:, i]
        for j in range(i):
            column = column - (orthonormal[:, j] @ column) * orthonormal[:, j]
        orthonormal[:, i] = column / np.linalg.norm(column)
    return 2 * orthonormal, orthonormal


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers and convolutions."""
    (u,) = module.need("hra_u")
    if len(u.shape) != 2:
        raise faulty(module.name, f"has hra_u {list(u.shape)}: (inputs, rank) is needed")
    return {"": HRA(u, bool(module.config.get("apply_GS", False)))}
