"""allocate, held against every possible choice of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from loratools.algebra.allocation import allocate, least_budget


def _spectra(sizes: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(k, generator=generator, dtype=torch.float64) * 10.0**-i).sort(descending=True).values
        for i, k in enumerate(sizes)
    ]


def _captured(spectra: Sequence[Tensor], ranks: Sequence[int]) -> float:
    return sum(float(s[:r].square().sum()) for s, r in zip(spectra, ranks, strict=True))


def _cost(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(r * c for r, c in zip(ranks, costs, strict=True))


def _best(spectra: Sequence[Tensor], costs: Sequence[int], budget: int, minimum: int, maximum: int) -> float:
    """By brute force."""
    choices = [range(min(minimum, len(s)), min(len(s), maximum) + 1) for s in spectra]
    within = (ranks for ranks in itertools.product(*choices) if _cost(ranks, costs) <= budget)
    return max(_captured(spectra, ranks) for ranks in within)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("minimum", [0, 1, 2])
def test_equal_costs_give_what_brute_force_finds(seed: int, minimum: int) -> None:
    spectra, costs = _spectra((5, 4, 6, 3), seed), [7] * 4

    for budget in range(4 * minimum * 7, 19 * 7, 5):
        ranks = allocate(spectra, costs, budget, minimum=minimum, maximum=4)

        assert _cost(ranks, costs) <= budget
        assert all(minimum <= r <= 4 for r in ranks)
        assert _captured(spectra, ranks) == pytest.approx(_best(spectra, costs, budget, minimum, 4), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_unequal_costs_miss_less_than_the_first_unit_that_did_not_fit(seed: int) -> None:
    spectra, costs = _spectra((5, 4, 6, 3), seed), [13, 4, 9, 6]
    units = sorted(
        ((float(x) ** 2 / c, i) for i, (s, c) in enumerate(zip(spectra, costs, strict=True)) for x in s[1:]),
        reverse=True,
    )
    breaks = set(itertools.accumulate((costs[i] for _, i in units), initial=sum(costs)))

    for budget in range(sum(costs), sum(len(s) * c for s, c in zip(spectra, costs, strict=True)) + 1):
        ranks = allocate(spectra, costs, budget)
        missed = _best(spectra, costs, budget, 1, 6) - _captured(spectra, ranks)

        assert _cost(ranks, costs) <= budget
        spent = max(b for b in breaks if b <= budget)
        fitting = sorted(breaks).index(spent)
        first_refused = units[fitting][0] * costs[units[fitting][1]] if fitting < len(units) else 0.0
        assert missed <= (1e-12 if budget in breaks else first_refused)


def test_modules_of_zeros_get_nothing_and_short_ones_no_more_than_they_have() -> None:
    spectra = [torch.zeros(3), torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1e-30]), torch.zeros(0)]

    assert allocate(spectra, [5, 6, 7, 8], 10_000, minimum=2) == [0, 2, 1, 0]
    assert least_budget(spectra, [5, 6, 7, 8], minimum=2) == 2 * 6 + 7


def test_a_budget_below_the_minimum_is_refused_with_what_it_needs() -> None:
    spectra = _spectra((3, 2), 0)

    with pytest.raises(ValueError, match="less than the 16"):
        allocate(spectra, [11, 5], 15)
    assert allocate(spectra, [11, 5], 16) == [1, 1]


def test_squares_beyond_the_range_of_floats_keep_their_order() -> None:
    spectra = [torch.tensor([1e300, 1e200], dtype=torch.float64), torch.tensor([1e250, 1e160], dtype=torch.float64)]

    assert allocate(spectra, [3, 3], 6, minimum=0) == [1, 1]
    assert allocate(spectra, [3, 3], 9, minimum=0) == [2, 1]


def test_caps_differ_by_module() -> None:
    spectra = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5.0, 4.0])]

    assert allocate(spectra, [1, 1], 99, maximum=[2, 1]) == [2, 1]
