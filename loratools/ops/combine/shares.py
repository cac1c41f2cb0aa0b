"""What a combination did to each adapter: measured on the values as they are stored, module by module and overall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.ops.lowrank.reduce import Reduced, ReducedModule
from loratools.short_repr import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors


@dataclass(frozen=True)
class Share:
    """How much of one adapter is left in the result, over all its modules.

    Numbers are None of an adapter that is zero or has weight 0, and overlaps where no other adapter has its modules.

    Attributes:
        path: The adapter, as it was named.
        weight: Its weight.
        gain: `<result, own> / |own|^2`, where own is its delta at weight 1: its weight where nothing overlaps.
        gain_lost: How much of the gain truncation and storing cost.
        interference: `|(result - own) on the row space of own| / |own|`: 0 where inputs that the adapter reacts to are
            answered as by the adapter alone.
        overlap: The share of its row space that lies in those of the others, `|R_i^T R_j|^2 / min(r_i, r_j)`, on
            average over the others and over the modules.
        overlap_baseline: The same for random subspaces of those sizes.
    """

    path: str
    weight: float
    gain: float | None = None
    gain_lost: float | None = None
    interference: float | None = None
    overlap: float | None = None
    overlap_baseline: float | None = None

    def to_dict(self) -> dict[str, object]:
        return {"path": self.path, "weight": self.weight, **_numbers(self)}


@dataclass(frozen=True)
class ModuleShare:
    """How much of one adapter is left in one module of the result.

    Attributes:
        adapter: The position of the adapter among the arguments, from 0.
        weight: Its weight in this module.
        gain: `<result, own> / |own|^2`, where own is its delta at weight 1: its weight where nothing overlaps.
        gain_lost: How much of the gain truncation and storing cost.
        interference: `|(result - own) on the row space of own| / |own|`: 0 where inputs that the adapter reacts to are
            answered as by the adapter alone.
        overlap: The share of its row space that lies in those of the others, on average over the others.
        overlap_baseline: The same for random subspaces of those sizes.
    """

    adapter: int
    weight: float
    gain: float | None
    gain_lost: float | None
    interference: float | None
    overlap: float | None
    overlap_baseline: float | None

    def to_dict(self) -> dict[str, object]:
        return {"adapter": self.adapter, "weight": self.weight, **_numbers(self)}


@dataclass(frozen=True)
class CombinedModule(ReducedModule):
    """The ranks and the error of one module of a combination, and what became of each adapter there.

    Attributes:
        name: The name of the module.
        rank_in: The rank before; None of a vector.
        rank: The stored rank; None of a vector.
        energy: The share of the squared Frobenius norm that the stored values hold.
        error: The relative Frobenius error of the stored values.
        norm: The Frobenius norm of what the delta should be.
        adapters: How much of each adapter is in this module.
    """

    adapters: tuple[ModuleShare, ...] = ()

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        return {**self.without_adapters(), "adapters": [a.to_dict() for a in self.adapters]}

    def without_adapters(self) -> dict[str, object]:
        """Return the numbers of the module alone."""
        return super().to_dict()


@dataclass(frozen=True)
class Part:
    """An adapter's part in one target, as sums that add up over targets: `<result, own>`, the same of what was to be
    stored, `|own|^2`, `|result - own|^2` on the row space of own, and of each other adapter overlap and baseline."""

    index: int
    weight: float
    inner: float
    target: float
    own_energy: float
    interference: float
    overlaps: tuple[tuple[float, float], ...]

    def share(self) -> ModuleShare:
        return ModuleShare(self.index, self.weight, *_ratios([self]))


def parts_of(terms: Sequence[tuple[int, float, Factors]], reduced: Reduced) -> tuple[Part, ...]:
    """The part of every adapter in one target; terms are its position, its weight, and its delta at weight 1."""
    from loratools.algebra.lowrank import concatenate, row_space

    result, deltas = reduced.factors, [delta for _, _, delta in terms]
    together = concatenate([(1.0, delta) for delta in deltas])
    ranks = [delta.rank for delta in deltas]
    products = _inners(result, together, ranks)
    before = products if reduced.target is result else _inners(reduced.target, together, ranks)
    spaces = [row_space(delta) for delta in deltas]
    parts = []
    for i, ((index, weight, delta), (rows, square)) in enumerate(zip(terms, spaces, strict=True)):
        difference = result.b @ (result.a @ rows) - delta.b @ (delta.a @ rows)
        other_spaces = [other_space for j, (other_space, _) in enumerate(spaces) if j != i]
        interference = float(difference.square().sum())
        overlaps = tuple(
            overlap(rows, other_space) for other_space in other_spaces if rows.shape[1] and other_space.shape[1]
        )
        parts.append(Part(index, weight, products[i], before[i], square, interference, overlaps))
    return tuple(parts)


def overlap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The share of two subspaces, given by orthonormal columns, that is common to both, and what it is at random.

    Hu et al., 2021, section 7.2: `|one^T other|^2 / min(r, s)`, whose expectation is `max(r, s) / n`.
    """
    r, s, n = first.shape[1], second.shape[1], first.shape[0]
    return float((first.mT @ second).square().sum()) / min(r, s), max(r, s) / n


def share_of(index: int, adapter: Adapter, weight: float, parts: Sequence[Sequence[Part]]) -> Share:
    own_parts = [p for module in parts for p in module if p.index == index]
    return Share(adapter.name, weight, *_ratios(own_parts))


def _ratios(parts: Sequence[Part]) -> tuple[float | None, float | None, float | None, float | None, float | None]:
    square = math.fsum(p.own_energy for p in parts)
    if not square:
        return None, None, None, None, None
    gain = math.fsum(p.inner for p in parts) / square
    lost = math.fsum(p.target - p.inner for p in parts) / square
    interference = math.sqrt(math.fsum(p.interference for p in parts) / square)
    pairs = [pair for p in parts for pair in p.overlaps]
    if not pairs:
        return gain, lost, interference, None, None
    shared, random = (math.fsum(pair[k] for pair in pairs) / len(pairs) for k in (0, 1))
    return gain, lost, interference, shared, random


def _inners(combination: Factors | Tensor, together: Factors, ranks: Sequence[int]) -> list[float]:
    """`<result, own>` for several deltas, which stand side by side in `together` with these ranks."""
    import torch

    from loratools.algebra.lowrank import Factors

    if isinstance(combination, Factors):
        by_term = ((combination.b.mT @ together.b) * (combination.a @ together.a.mT)).sum(dim=0)
    else:
        by_term = ((together.b.mT @ combination) * together.a).sum(dim=1)
    return [float(part.sum()) for part in torch.split(by_term, list(ranks))]


def _numbers(share: Share | ModuleShare) -> dict[str, float | None]:
    names = ("gain", "gain_lost", "interference", "overlap", "overlap_baseline")
    return {name: getattr(share, name) for name in names}
