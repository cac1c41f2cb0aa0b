"""Rows that adapters replace, such as the embeddings of new tokens: those of all adapters together.

A row that only one adapter replaces is its. One that several replace with different values is that of the first, or
their mean, weighted by the adapters' weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from loratools.adapter import Replacement
from loratools.errors import MismatchError
from loratools.ops.lowrank.reduce import widest
from loratools.storage.casting import narrowed
from loratools.tensors.lazy import from_torch

if TYPE_CHECKING:
    from torch import Tensor


def united(name: str, owners: Sequence[tuple[float, Replacement]], policy: str) -> tuple[Replacement, int]:
    """The rows of all owners, sorted, and how many of them have different values; these by `policy`: `average`, or
    else the first.

    Raises:
        MismatchError: Rows of different widths, or weights that have no mean.
    """
    import torch

    if len({r.tensor.shape[1:] for _, r in owners}) > 1:
        raise MismatchError(f"the adapters replace rows of '{name}' with rows of different widths")
    by_row: dict[int, list[tuple[float, Tensor]]] = {}
    for weight, replacement in owners:
        values = replacement.tensor.read().double()
        for row, vector in zip(replacement.rows or (), values, strict=True):
            by_row.setdefault(row, []).append((weight, vector))
    differing = {row for row, pairs in by_row.items() if any(not torch.equal(pairs[0][1], v) for _, v in pairs[1:])}
    rows = tuple(sorted(by_row))
    averaged = differing if policy == "average" else set()
    vectors = [
        weighted_mean(f"rows of '{name}'", *zip(*by_row[row], strict=True)) if row in averaged else by_row[row][0][1]
        for row in rows
    ]
    stored = narrowed(name, torch.stack(vectors), widest([r.tensor.dtype for _, r in owners]))
    return Replacement(from_torch(stored), owners[0][1].declared, rows), len(differing)


def weighted_mean(name: str, weights: Sequence[float], values: Iterable[Tensor]) -> Tensor:
    """The weighted mean of float64 values, which are taken one at a time.

    Raises:
        MismatchError: The weights sum to 0.
    """
    import torch

    total = math.fsum(weights)
    if not total:
        raise MismatchError(f"the weights of the adapters that replace {name} sum to 0, and have no mean")
    return reduce(torch.add, (v * (weight / total) for weight, v in zip(weights, values, strict=True)))
