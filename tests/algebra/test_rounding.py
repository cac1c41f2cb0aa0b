import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.algebra.rounding import gamma, merge_error_bound, ulp, unit_roundoff

DTYPES = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}  # bits of the significand


@pytest.mark.parametrize(("dtype", "bits"), DTYPES.items())
def test_unit_roundoff_is_half_the_spacing_above_one(dtype, bits):
    assert unit_roundoff(dtype) == 2.0**-bits
    assert float(ulp(torch.ones(()), dtype)) == 2 * unit_roundoff(dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in spacing")
@pytest.mark.parametrize(
    ("torch_type", "numpy_type"),
    [(torch.float16, np.float16), (torch.float32, np.float32), (torch.float64, np.float64)],
)
def test_ulp_equals_numpy_spacing_from_zero_to_the_largest(torch_type, numpy_type):
    info = np.finfo(numpy_type)
    values = [0, info.smallest_subnormal, info.tiny / 2, np.nextafter(info.tiny, numpy_type(0)), info.tiny]
    values += [2 * info.tiny, 0.3, 1, np.nextafter(numpy_type(1), numpy_type(0)), 1.5, 2, 1000, info.max]
    x = np.array(values, dtype=numpy_type)

    found = ulp(torch.from_numpy(np.concatenate([x, -x])), torch_type)

    expected = np.abs(np.spacing(x)).astype(np.float64)
    # numpy steps out of the range at the largest number; the grid below it has the spacing of its binade.
    expected[-1] = float(info.max) - float(np.nextafter(info.max, numpy_type(0)))
    np.testing.assert_array_equal(found, np.concatenate([expected, expected]))
    assert found.dtype == torch.float64


@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_bfloat16_ulp_is_the_distance_to_the_next_bit_pattern(value):
    low = torch.tensor(abs(value)).view(torch.int32) & -65536  # the bfloat16 at or below: the upper 16 bits
    high = low + 65536

    expected = high.view(torch.float32).double() - low.view(torch.float32).double()

    assert float(ulp(torch.tensor(value), torch.bfloat16)) == float(expected)


def test_ulp_of_a_value_off_the_grid_is_that_of_its_binade():
    assert float(ulp(torch.tensor(1.9999999, dtype=torch.float64), torch.bfloat16)) == 2**-7
    assert float(ulp(torch.tensor(-2.0000001, dtype=torch.float64), torch.bfloat16)) == 2**-6


def test_ulp_of_what_is_not_finite_is_nan():
    assert ulp(torch.tensor([math.inf, -math.inf, math.nan]), torch.float32).isnan().all()


def test_gamma_is_a_little_more_than_n_roundings():
    assert gamma(3, 0.125) == 0.375 / 0.625
    assert gamma(0, 0.1) == 0
    with pytest.raises(ValueError, match="no bound"):
        gamma(4, 0.25)


def test_merge_error_bound_is_half_an_ulp_plus_accumulated_roundings():
    base, product, result = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([2.25])

    found = merge_error_bound(base, product, result, torch.bfloat16, terms=4)

    assert float(found) == 2**-7 + gamma(6, 2**-24) * 2.5
    in_double = merge_error_bound(base.double(), product.double(), result.double(), torch.float64, terms=4)
    assert float(in_double) == 2**-52 + gamma(6, 2**-53) * 2.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merging_in_float32_and_rounding_once_stays_within_the_bound(dtype):
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(50, 16, generator=g), torch.randn(16, 70, generator=g)
    base = torch.randn(50, 70, generator=g).to(dtype)
    scale = 0.3

    merged = (base.float() + scale * (b @ a)).to(dtype)

    exact = base.double() + scale * (b.double() @ a.double())
    error = (merged.double() - exact).abs()
    bound = merge_error_bound(base.abs(), scale * (b.double().abs() @ a.double().abs()), merged, dtype, terms=16)
    assert (error <= bound).all()
    if dtype != torch.float32:
        # A second rounding on the way does not fit: the bound is worth having.
        twice = (base + (scale * (b @ a)).to(dtype)).double()
        assert ((twice - exact).abs() > bound).any()
