from __future__ import annotations

import torch

from loratools import registry
from loratools.algebra.lowrank import Factors
from loratools.methods import linear


def _factors(seed: int, rank: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(10, rank, generator=generator, dtype=torch.float64)
    return Factors(b, torch.randn(rank, 6, generator=generator, dtype=torch.float64))


def test_linear_is_the_weighted_sum_of_the_deltas() -> None:
    one, two = _factors(0, 2), _factors(1, 3)

    found = linear.combine([(0.5, one), (-2.0, two)])

    assert found.rank == 5
    torch.testing.assert_close(found.b @ found.a, 0.5 * one.b @ one.a - 2 * two.b @ two.a, rtol=1e-14, atol=1e-14)


def test_linear_of_one_at_weight_one_is_the_very_same_object() -> None:
    alone = _factors(0, 2)

    assert linear.combine([(1.0, alone)]) is alone
    assert linear.combine([(2.0, alone)]) is not alone


def test_registry_has_a_summary_for_every_method() -> None:
    assert "linear" in registry.names("methods")
    assert registry.summary("methods", "linear").startswith("The exact weighted sum")
    assert all(callable(registry.load("methods", name).combine) for name in registry.names("methods"))
