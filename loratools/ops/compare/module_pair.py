"""Two deltas of one module: how alike they are, from their factors alone, and what adds up over modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter
from loratools.errors import MismatchError
from loratools.ops.combine.shares import overlap
from loratools.ops.compare.report import ComparedModule
from loratools.ops.lowrank.factors import exact_factors, is_vector, require_factors
from loratools.ops.lowrank.reduce import inner
from loratools.updates.parts.protocol import flow

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors


@dataclass(frozen=True)
class ModulePair:
    """One target: squares and products that add up over targets, and what does not."""

    name: str
    ranks: tuple[int, int]
    squares: tuple[float, float]
    product: float
    rows: tuple[float, float] | None
    columns: tuple[float, float] | None
    angles: tuple[float, ...]
    disturbances: tuple[float, float]

    def module(self) -> ComparedModule:
        cosine, ratio, gains, interferences = _of_sums(self.squares, self.product, self.disturbances)
        overlap, baseline = self.rows or (None, None)
        output_overlap, output_baseline = self.columns or (None, None)
        return ComparedModule(
            name=self.name,
            ranks=self.ranks,
            norms=(math.sqrt(self.squares[0]), math.sqrt(self.squares[1])),
            cosine=cosine,
            overlap=overlap,
            overlap_baseline=baseline,
            output_overlap=output_overlap,
            output_baseline=output_baseline,
            angles=self.angles,
            norm_ratio=ratio,
            gains=gains,
            interferences=interferences,
        )


@dataclass(frozen=True, eq=False)
class Side:
    """One delta: its factors, orthonormal bases of its row and column space, and its squared norm.

    Attributes:
        factors: (out, r) and (r, in) in float64, scale included.
        rows: An orthonormal basis of the row space, (in, rank).
        columns: The same of the column space, (out, rank).
        square: The squared Frobenius norm.
        is_vector: Whether it changes a vector, which has no row space.
    """

    factors: Factors
    rows: Tensor
    columns: Tensor
    square: float
    is_vector: bool

    @classmethod
    def of(cls, name: str, adapter: Adapter) -> Side:
        """The delta of a module of an adapter.

        Raises:
            InputError: Values that are not finite.
        """
        from loratools.algebra.lowrank import Factors, row_space

        factors = exact_factors(adapter.updates[name], name, adapter.name)
        rows, square = row_space(factors)
        columns = row_space(Factors(factors.a.mT, factors.b.mT))[0]
        return cls(factors, rows, columns, square, is_vector(adapter.updates[name]))


def module_pair(name: str, first: Side, second: Side, *, angles: bool = True) -> ModulePair:
    """How two deltas of a module are related; without the principal angles where they are not asked for."""
    import torch

    f, g = first.factors, second.factors
    comparable = bool(first.rows.shape[1] and second.rows.shape[1]) and not first.is_vector
    return ModulePair(
        name,
        (first.rows.shape[1], second.rows.shape[1]),
        (first.square, second.square),
        inner(f, g),
        overlap(first.rows, second.rows) if comparable else None,
        overlap(first.columns, second.columns) if comparable else None,
        tuple(torch.rad2deg(principal_angles(first.rows, second.rows)).tolist()) if comparable and angles else (),
        (
            float((g.b @ (g.a @ first.rows)).square().sum()),
            float((f.b @ (f.a @ second.rows)).square().sum()),
        ),
    )


def principal_angles(smaller: Tensor, larger: Tensor) -> Tensor:
    """The angles between two subspaces, each given by orthonormal columns: (the smaller count,), ascending, in radians.

    Angles below 45 degrees from sines and the others from cosines, since the arc cosine of what is nearly 1 has half of
    the digits. Björck and Golub, "Numerical methods for computing angles between linear subspaces", 1973.
    """
    import torch

    if smaller.shape[1] > larger.shape[1]:
        smaller, larger = larger, smaller
    cosines = torch.linalg.svdvals(larger.mT @ smaller).clamp(max=1)
    sines = torch.linalg.svdvals(smaller - larger @ (larger.mT @ smaller)).flip(0).clamp(max=1)
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos())


_OfBoth = tuple[float | None, float | None]


def _of_sums(
    squares: Sequence[float], product: float, disturbances: Sequence[float]
) -> tuple[float | None, float | None, _OfBoth, _OfBoth]:
    cosine = product / math.sqrt(squares[0] * squares[1]) if squares[0] and squares[1] else None
    ratio = math.sqrt(squares[1] / squares[0]) if squares[0] else None
    gains = (1 + product / squares[0] if squares[0] else None, 1 + product / squares[1] if squares[1] else None)
    met = [math.sqrt(d / s) if s else None for d, s in zip(disturbances, squares, strict=True)]
    return cosine, ratio, gains, (met[0], met[1])


def overall(pairs: Sequence[ModulePair]) -> dict[str, Any]:
    sums = [math.fsum(p.squares[k] for p in pairs) for k in (0, 1)]
    met = [math.fsum(p.disturbances[k] for p in pairs) for k in (0, 1)]
    cosine, ratio, gains, interferences = _of_sums(sums, math.fsum(p.product for p in pairs), met)
    rows = [p.rows for p in pairs if p.rows is not None]
    columns = [p.columns for p in pairs if p.columns is not None]
    return {
        "cosine": cosine,
        "norm_ratio": ratio,
        "overlap": mean_overlap(rows, 0),
        "overlap_baseline": mean_overlap(rows, 1),
        "output_overlap": mean_overlap(columns, 0),
        "output_baseline": mean_overlap(columns, 1),
        "gains": gains,
        "interferences": interferences,
    }


def mean_overlap(pairs: Sequence[tuple[float, float]], side: int) -> float | None:
    return math.fsum(p[side] for p in pairs) / len(pairs) if pairs else None


def require_comparable(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Check that the updates of these modules have factors, and one shape wherever there are several.

    Raises:
        UnsupportedError: Some have no factors.
        MismatchError: Some have another shape in one of the adapters.
    """
    having = {name: [adapter for adapter in adapters if name in adapter.updates] for name in names}
    require_factors((f"{n} of '{a.name}'", a.updates[n]) for n, each in having.items() for a in each)
    misfits = [
        f"{n}   {' and '.join(dict.fromkeys(flow(a.updates[n].shape) for a in each))}"
        for n, each in having.items()
        if len({a.updates[n].shape for a in each}) > 1
    ]
    if misfits:
        raise MismatchError(
            f"the adapters differ in the shape of {len(misfits)} of {len(names)} modules",
            details=misfits,
            hint="they were trained on different models; leave such modules out with --exclude",
        )
