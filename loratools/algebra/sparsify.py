"""Sparsification of matrices, and sign election among several of them.

A matrix may be too large to be held several times, so it is given as a function that returns its blocks of rows, as
often as needed. A sparsifier reads all of them (or none) and returns a rule, which is then applied block by block, in
the order of the blocks. Only magnitudes need a pass over the whole matrix, once each, in float64.

Entries that tie with a threshold are all kept: which of them a sort would put first is arbitrary. Zero is not a sign:
if the votes for an entry cancel exactly, it has no elected sign, and nothing is kept there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Generator, Tensor

# Returns the blocks of rows of a matrix, from the first to the last.
Blocks: TypeAlias = Callable[[], Iterable[Tensor]]
Rule: TypeAlias = Callable[[Tensor], Tensor]


def all_of_it(block: Tensor) -> Tensor:
    """The rule that keeps everything."""
    return block


def largest(blocks: Blocks, density: float, *, least: int = 1) -> Rule:
    """Keep the share `density` of the entries with the largest magnitudes, rounded down, but at least `least`."""
    if density >= 1:
        return all_of_it
    sizes = _magnitudes(blocks)
    threshold = threshold_of(sizes, max(least, int(density * sizes.numel())))
    return lambda block: block * (block.abs() >= threshold)


def without_outliers(blocks: Blocks, density: float, outliers: float) -> Rule:
    """Drop the share `outliers` with the largest magnitudes, then the smallest until the share `density` is left.

    If both are impossible, `density` takes precedence: fewer outliers are dropped.
    """
    if density >= 1:
        return all_of_it
    sizes = _magnitudes(blocks)
    total = sizes.numel()
    count = max(1, int(density * total))
    first = max(0, total - count - int(outliers * total))
    low, high = _order_statistics(sizes, [first, first + count - 1])
    return lambda block: block * ((block.abs() >= low) & (block.abs() <= high))


def at_random(density: float, generator: Generator) -> Rule:
    """Keep each entry with probability `density`, divided by it, so that the expected matrix is unchanged."""
    if density >= 1:
        return all_of_it

    def rule(block: Tensor) -> Tensor:
        return block * (torch.rand(block.shape, generator=generator) < density) / density

    return rule


def at_random_by_rank(density: float, spread: float, generator: Generator) -> Rule:
    """Keep each entry with a probability from `density - spread`, for the smallest of its row, to `density + spread`,
    for the largest, in equal steps; divided by that probability."""

    def rule(block: Tensor) -> Tensor:
        ranks = block.abs().argsort(dim=1).argsort(dim=1).double()
        steps = block.shape[1] - 1
        share = ranks / steps if steps else torch.full_like(ranks, 0.5)
        keep = (density - spread) + 2 * spread * share
        return block * (torch.rand(block.shape, generator=generator) < keep) / keep

    return rule


def elected(blocks: Sequence[Tensor], *, by: str, average: str, weights: Sequence[float]) -> Tensor:
    """Return, for each entry, the sum or mean of the values that have the elected sign.

    by: `sum`, the sign of the sum; `count`, that of most.
    average: `count` divides by how many agree, `weights` by their weights, `none` not at all.
    """
    stack = torch.stack(list(blocks))
    votes = stack.sum(dim=0) if by == "sum" else stack.sign().sum(dim=0)
    agree = (stack.sign() == votes.sign()) & (stack != 0)
    total: Tensor = (stack * agree).sum(dim=0)
    if average == "none":
        return total
    each = torch.ones(len(blocks)) if average == "count" else torch.tensor(list(weights))
    divisor = (agree * each.double().view(-1, 1, 1)).sum(dim=0)
    return total / torch.where(divisor == 0, 1.0, divisor)


def threshold_of(sizes: Tensor, count: int) -> float:
    """Return the `count`-th largest value of `sizes`; infinity if `count` is 0. Reorders `sizes` in place."""
    return _order_statistics(sizes.view(-1), [sizes.numel() - count])[0] if count else math.inf


def _magnitudes(blocks: Blocks) -> Tensor:
    return torch.cat([block.abs().reshape(-1) for block in blocks()])


def _order_statistics(values: Tensor, places: Sequence[int]) -> list[float]:
    """The values at these positions in sorted order. Reorders the array in place, which avoids the copy of a large
    matrix that `kthvalue` makes.
    """
    array = values.numpy()
    array.partition(sorted(set(places)))
    return [float(array[place]) for place in places]
