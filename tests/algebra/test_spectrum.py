import math

import pytest
import torch

from loratools.algebra.spectrum import effective_rank, stable_rank


def test_stable_rank_is_energy_over_largest_energy():
    # 16 + 4 + 4 over 16
    assert stable_rank(torch.tensor([4.0, 2.0, 2.0])) == 1.5


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    # p = 1/2, 1/4, 1/4: entropy 1.5 ln 2
    assert effective_rank(torch.tensor([4.0, 2.0, 2.0])) == pytest.approx(2**1.5, rel=1e-14)


@pytest.mark.parametrize("measure", [stable_rank, effective_rank])
def test_equal_singular_values_count_one_each(measure):
    assert measure(torch.full((7,), 3.0)) == pytest.approx(7, rel=1e-14)


@pytest.mark.parametrize("measure", [stable_rank, effective_rank])
def test_zeros_do_not_count_and_nothing_is_zero(measure):
    assert measure(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert measure(torch.zeros(3)) == 0
    assert measure(torch.zeros(0)) == 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("measure", [stable_rank, effective_rank])
def test_scale_does_not_matter_even_where_squares_leave_the_range(measure, scale):
    s = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)

    assert measure(s * scale) == pytest.approx(measure(s), rel=1e-12)
    assert not math.isnan(measure(s * scale))
