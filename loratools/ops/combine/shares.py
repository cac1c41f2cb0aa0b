"""How much of each adapter is in a combination, measured on the stored values, per module and overall."""

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

    `own` is the adapter's delta at weight 1. Numbers are None if the adapter is zero or has weight 0. Overlaps are None
    if no other adapter has its modules.

    Attributes:
        path: The adapter, as it was named.
        weight: Its weight.
        gain: `<result, own> / |own|^2`. It equals the weight if the adapters do not overlap.
        gain_lost: How much of the gain was lost by truncation and by the stored dtype.
        interference: `|(result - own) on the row space of own| / |own|`. 0 means that the result answers to the
            adapter's inputs exactly as the adapter alone.
        overlap: The share of its row space that is common with another adapter, `|R_i^T R_j|^2 / min(r_i, r_j)`,
            averaged over the other adapters and over the modules.
        overlap_baseline: The overlap expected of random subspaces of the same sizes.
    """

    path: str
    weight: float
    gain: float | None = None
    gain_lost: float | None = None
    interference: float | None = None
    overlap: float | None = None
    overlap_baseline: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `adapters` in the document of `loratools combine --json`."""
        return {"path": self.path, "weight": self.weight, **_numbers(self)}


@dataclass(frozen=True)
class ModuleShare:
    """How much of one adapter is left in one module of the result.

    Attributes:
        adapter: The position of the adapter among the arguments, from 0.
        weight: Its weight in this module.
        gain: `<result, own> / |own|^2`, where `own` is its delta at weight 1. It equals the weight if the adapters do
            not overlap.
        gain_lost: How much of the gain was lost by truncation and by the stored dtype.
        interference: `|(result - own) on the row space of own| / |own|`. 0 means that the result answers to the
            adapter's inputs exactly as the adapter alone.
        overlap: The share of its row space that is common with another adapter, averaged over the other adapters.
        overlap_baseline: The overlap expected of random subspaces of the same sizes.
    """

    adapter: int
    weight: float
    gain: float | None
    gain_lost: float | None
    interference: float | None
    overlap: float | None
    overlap_baseline: float | None

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `adapters` in a module of the document of `loratools combine --json`."""
        return {"adapter": self.adapter, "weight": self.weight, **_numbers(self)}


@dataclass(frozen=True)
class CombinedModule(ReducedModule):
    """The ranks and the error of one module of a combination, and how much of each adapter is in it.

    Attributes:
        name: The name of the module.
        rank_in: The rank before; None for a vector.
        rank: The stored rank; None for a vector.
        energy: The share of the squared Frobenius norm that the stored values keep.
        error: The relative Frobenius error of the stored values.
        norm: The Frobenius norm of the exact delta.
        adapters: How much of each adapter is in this module.
    """

    adapters: tuple[ModuleShare, ...] = ()

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `modules` in the document of `loratools combine --json`."""
        return {**self.without_adapters(), "adapters": [a.to_dict() for a in self.adapters]}

    def without_adapters(self) -> dict[str, object]:
        """Return the numbers of the module without those of its adapters."""
        return super().to_dict()


@dataclass(frozen=True)
class Part:
    """One adapter's contribution to one target, as sums that add up over targets: `<result, own>`, the same before
    truncation and storing, `|own|^2`, `|result - own|^2` on the row space of own, and the overlap and baseline with
    each other adapter.
    """

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
    """The contribution of every adapter to one target. `terms`: position, weight, and delta at weight 1, of each."""
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
    """The overlap of two subspaces, given by orthonormal columns, and the overlap expected at random.

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
    """`<result, own>` for several deltas, whose factors are concatenated in `together` with these ranks."""
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
