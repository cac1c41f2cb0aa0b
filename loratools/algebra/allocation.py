"""Distribution of a budget of parameters or bytes over modules, as ranks with the smallest total error.

One more unit of rank in a module captures its next squared singular value, at the cost of a unit there. So units are
taken in the order of `s^2 / cost`, over all modules at once. Singular values descend, so the units of one module come
in their order. If all costs are equal, no other choice captures more (exchanging a unit taken for one left out gains
nothing). If they differ, this is a knapsack problem: the choice is optimal at every budget that the order spends
exactly, and elsewhere any other choice captures less than one unit more, the first that did not fit (Dantzig,
"Discrete-variable extremum problems", Operations Research 1957).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def allocate(
    spectra: Sequence[Tensor],
    costs: Sequence[int],
    budget: int,
    *,
    minimum: int = 1,
    maximum: int | Sequence[int] | None = None,
) -> list[int]:
    """Return a rank for each module, such that `sum(rank * cost) <= budget` and the captured energy is largest.

        spectra: one (k,) of descending singular values for each module

    costs     of one unit of rank, in what the budget is counted in: (out + in) parameters, or bytes.
    minimum   what each module gets that has that many singular values above zero, whatever it captures; a module
              with fewer gets all of them, one of zeros gets 0.
    maximum   no rank is above it: one for all modules, or one for each.

    Raises:
        ValueError: The minimum alone costs more than the budget (`least_budget`).
    """
    largest = _largest_ranks(spectra, maximum)
    ranks = [min(minimum, most) for most in largest]
    unspent = budget - _total(ranks, costs)
    if unspent < 0:
        raise ValueError(f"a budget of {budget} is less than the {budget - unspent} of rank {minimum} everywhere")
    modules = [i for i, (low, most) in enumerate(zip(ranks, largest, strict=True)) for _ in range(most - low)]
    if not modules:
        return ranks
    # Divided by the largest, so that squares stay in range.
    top = max(float(s[0]) for s, most in zip(spectra, largest, strict=True) if most)
    rates = torch.cat(
        [
            (s[low:most].double().cpu() / top).square() / cost
            for s, cost, low, most in zip(spectra, costs, ranks, largest, strict=True)
        ]
    )
    order = torch.sort(rates, descending=True, stable=True).indices.tolist()
    cheapest = min(costs[i] for i in set(modules))
    for place in order:
        if unspent < cheapest:
            break
        module = modules[place]
        # The unspent budget only shrinks: if one unit does not fit, no later unit of that module does.
        if costs[module] <= unspent:
            ranks[module] += 1
            unspent -= costs[module]
    return ranks


def least_budget(
    spectra: Sequence[Tensor],
    costs: Sequence[int],
    *,
    minimum: int = 1,
    maximum: int | Sequence[int] | None = None,
) -> int:
    """Return the cost of the minimum, which is the smallest budget that `allocate` takes."""
    return _total([min(minimum, most) for most in _largest_ranks(spectra, maximum)], costs)


def _largest_ranks(spectra: Sequence[Tensor], maximum: int | Sequence[int] | None) -> list[int]:
    """The largest useful or allowed rank of each module."""
    positive = [int((s > 0).sum()) for s in spectra]
    if maximum is None:
        return positive
    caps = [maximum] * len(positive) if isinstance(maximum, int) else maximum
    return [min(count, cap) for count, cap in zip(positive, caps, strict=True)]


def _total(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
