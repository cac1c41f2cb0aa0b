"""Methods that work entry by entry, in selectable coordinates.

    full     the weights themselves: the method as its paper has it. Matrices are dense, (out, in), in blocks of rows,
             and so is the result.
    core     common coordinates of the weighted deltas (`algebra.shared`), (p, q) with p and q at most the sum of
             ranks: another method, in the sense of Panariello et al., 2025, https://arxiv.org/abs/2509.17786.
    knots    the right singular vectors of the weighted deltas side by side, (p, in), as in KnOTS: Stoica et al., 2025,
             https://arxiv.org/abs/2410.19735.

Entries mean something different in each coordinate system, so the results differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.methods import Option, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.sparsify import Blocks, Rule
    from loratools.methods import Combination

# Entries of a block, per adapter: a few such blocks fit in the cache.
_BLOCK = 1 << 16

SPACE = Option(
    "space",
    "full",
    "the coordinates of the entries: full (dense weights), core or knots (small)",
    choices=("full", "core", "knots"),
)
JOIN = Option(
    "join", "linear", "how the remaining entries are joined: sum, or election of TIES", choices=("linear", "ties")
)
MAJORITY = Option("majority", "sum", "the elected sign is that of the sum, or of most", choices=("sum", "count"))
AVERAGE = Option(
    "average",
    "count",
    "what agreeing entries are divided by: their number, their weights, or nothing",
    choices=("count", "weights", "none"),
)


def density(default: float) -> Option:
    return Option("density", default, "share of the entries that is kept", low=0, high=1, open_low=True)


@dataclass(frozen=True)
class Space:
    """The weighted deltas as matrices of one shape.

    rows(i, start, stop): rows of the i-th matrix.   back: converts a matrix back to a delta.
    """

    count: int
    shape: tuple[int, int]
    rows: Callable[[int, int, int], Tensor]
    back: Callable[[Tensor], Combination]

    def ranges(self) -> Iterator[tuple[int, int]]:
        step = max(1, _BLOCK // max(1, self.shape[1]))
        return ((at, min(at + step, self.shape[0])) for at in range(0, self.shape[0], step))

    def blocks(self, index: int) -> Blocks:
        return lambda: (self.rows(index, start, stop) for start, stop in self.ranges())

    def by_blocks(self, merge: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """The matrix whose blocks are the results of `merge` for the blocks of all adapters."""
        import torch

        result = torch.empty(self.shape, dtype=torch.float64)
        for start, stop in self.ranges():
            result[start:stop] = merge([self.rows(i, start, stop) for i in range(self.count)])
        return result


def space(terms: Terms, name: str) -> Space:
    if name == "full":
        deltas = terms.weighted
        shape = (deltas[0].out_features, deltas[0].in_features)
        return Space(len(terms), shape, lambda i, start, stop: deltas[i].b[start:stop] @ deltas[i].a, lambda x: x)
    if name == "core":
        from loratools.algebra.lowrank import Framed

        frame = terms.shared
        return _small(frame.cores, lambda x: Framed(frame.left, x, frame.right))
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.shared import side_by_side

    svd = side_by_side(terms.weighted)
    return _small(svd.v, lambda x: Factors(svd.u * svd.s, x))


def _small(matrices: Sequence[Tensor], back: Callable[[Tensor], Combination]) -> Space:
    shape = (matrices[0].shape[0], matrices[0].shape[1])
    return Space(len(matrices), shape, lambda i, start, stop: matrices[i][start:stop], back)


def sparse_sum(
    terms: Terms,
    space_name: str,
    rule: Callable[[Blocks, int], Rule],
    *,
    join: str,
    majority: str = "sum",
    average: str = "count",
) -> Combination:
    """Sparsify each weighted delta by `rule(blocks, index)`, then join them: by their sum, or by the
    election of TIES.
    """
    from loratools.algebra.sparsify import elected

    matrices = space(terms, space_name)
    rules = [rule(matrices.blocks(i), i) for i in range(matrices.count)]

    def merge(blocks: Sequence[Tensor]) -> Tensor:
        sparse = [keep(block) for keep, block in zip(rules, blocks, strict=True)]
        if join == "linear":
            total = sparse[0].clone()
            for term in sparse[1:]:
                total += term
            return total
        return elected(sparse, by=majority, average=average, weights=terms.weights)

    return matrices.back(matrices.by_blocks(merge))
