import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.algebra.rounding import LARGEST, STORAGE, gamma, merge_error_bound, narrow, ulp, unit_roundoff, widen

DTYPES = {"F16": 11, "BF16": 8, "F32": 24, "F64": 53}  # bits of the significand
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def stored(values: np.ndarray, dtype: str, **options: object) -> np.ndarray:
    out = np.empty(values.shape, STORAGE[dtype])
    narrow(values, dtype, out, **options)
    return out


def values_of(numbers: np.ndarray, dtype: str, wide: type = np.float32) -> np.ndarray:
    out = np.empty(numbers.shape, wide)
    widen(numbers, dtype, out)
    return out


def by_torch(numbers: np.ndarray, dtype: str) -> torch.Tensor:
    held = torch.from_numpy(numbers.copy())
    return held.view(torch.bfloat16) if dtype == "BF16" else held


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_widening_every_16_bit_number_is_exact(dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(STORAGE[dtype])

    for wide in (np.float32, np.float64):
        np.testing.assert_array_equal(values_of(numbers, dtype, wide), by_torch(numbers, dtype).double().numpy())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrowing_every_16_bit_number_gives_it_back(dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(STORAGE[dtype])
    values = values_of(numbers, dtype)

    again = stored(values, dtype)

    real = ~np.isnan(values)
    np.testing.assert_array_equal(again.view(np.uint16)[real], numbers.view(np.uint16)[real])
    assert np.isnan(values_of(again, dtype)[~real]).all()


@given(st.integers(0, 2**32 - 1))
def test_narrowing_a_float32_to_bfloat16_rounds_as_torch_does(pattern):
    value = np.array([pattern], dtype=np.uint32).view(np.float32)

    ours, theirs = by_torch(stored(value, "BF16"), "BF16"), torch.from_numpy(value).bfloat16()

    assert torch.equal(ours, theirs) or (ours.isnan().all() and theirs.isnan().all())


@given(st.integers(0, 2**64 - 1))
def test_narrowing_a_float64_to_bfloat16_rounds_once(pattern):
    value = np.array([pattern], dtype=np.uint64).view(np.float64)
    if not np.isfinite(value[0]) or abs(value[0]) > LARGEST["BF16"]:
        value = np.array([1 + 2.0**-8 + pattern * 2.0**-116])  # just above a tie, where rounding twice goes wrong

    found = values_of(stored(value, "BF16"), "BF16", np.float64)[0]

    # The nearest of the grid, computed in whole units; Python's round goes to even at ties, as it must.
    unit = float(ulp(value, "BF16")[0])
    assert found == round(value[0] / unit) * unit


def test_rounding_twice_would_be_seen():
    value = np.array([1 + 2.0**-8 + 2.0**-40])  # float32 drops the last part, and what is left is a tie

    assert values_of(stored(value, "BF16"), "BF16")[0] == 1 + 2.0**-7
    assert values_of(stored(value.astype(np.float32), "BF16"), "BF16")[0] == 1


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_what_is_beyond_the_range_becomes_infinite(dtype):
    values = np.array([LARGEST[dtype], -LARGEST[dtype], 1.1 * LARGEST[dtype], -1.1 * LARGEST[dtype]])

    found = values_of(stored(values, dtype), dtype, np.float64)

    np.testing.assert_array_equal(found, [LARGEST[dtype], -LARGEST[dtype], np.inf, -np.inf])


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_narrowing_tells_what_the_stored_numbers_are_worth(dtype, wide):
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(wide)
    rounded = np.empty_like(values)

    found = stored(values, dtype, rounded=rounded)

    np.testing.assert_array_equal(rounded, values_of(found, dtype, wide))
    assert dtype == "F32" or (rounded != values).any()


def test_nans_stay_nans():
    patterns = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], dtype=np.uint32).view(np.float32)

    assert np.isnan(values_of(stored(patterns, "BF16"), "BF16")).all()


@pytest.mark.parametrize(("dtype", "bits"), DTYPES.items())
def test_unit_roundoff_is_half_the_spacing_above_one(dtype, bits):
    assert unit_roundoff(dtype) == 2.0**-bits
    assert float(ulp(np.ones(1), dtype)[0]) == 2 * unit_roundoff(dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in spacing")
@pytest.mark.parametrize(
    ("dtype", "numpy_type"),
    [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)],
)
def test_ulp_equals_numpy_spacing_from_zero_to_the_largest(dtype, numpy_type):
    info = np.finfo(numpy_type)
    values = [0, info.smallest_subnormal, info.tiny / 2, np.nextafter(info.tiny, numpy_type(0)), info.tiny]
    values += [2 * info.tiny, 0.3, 1, np.nextafter(numpy_type(1), numpy_type(0)), 1.5, 2, 1000, info.max]
    x = np.array(values, dtype=numpy_type)

    found = ulp(np.concatenate([x, -x]), dtype)

    expected = np.abs(np.spacing(x)).astype(np.float64)
    # numpy steps out of the range at the largest number; the grid below it has the spacing of its binade.
    expected[-1] = float(info.max) - float(np.nextafter(info.max, numpy_type(0)))
    np.testing.assert_array_equal(found, np.concatenate([expected, expected]))
    assert found.dtype == np.float64


@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_bfloat16_ulp_is_the_distance_to_the_next_bit_pattern(value):
    low = np.array([abs(value)], np.float32).view(np.uint32) & 0xFFFF0000  # the bfloat16 at or below: the upper bits
    high = low + np.uint32(65536)

    expected = high.view(np.float32).astype(np.float64) - low.view(np.float32).astype(np.float64)

    assert ulp(np.array([value]), "BF16")[0] == expected[0]


def test_ulp_of_a_value_off_the_grid_is_that_of_its_binade():
    assert ulp(np.array([1.9999999]), "BF16")[0] == 2**-7
    assert ulp(np.array([-2.0000001]), "BF16")[0] == 2**-6


def test_ulp_of_what_is_not_finite_is_nan():
    assert np.isnan(ulp(np.array([math.inf, -math.inf, math.nan]), "F32")).all()


def test_gamma_is_a_little_more_than_n_roundings():
    assert gamma(3, 0.125) == 0.375 / 0.625
    assert gamma(0, 0.1) == 0
    with pytest.raises(ValueError, match="no bound"):
        gamma(4, 0.25)


def test_merge_error_bound_is_half_an_ulp_plus_accumulated_roundings():
    base, product, result = np.array([2.0]), np.array([0.5]), np.array([2.25])

    found = merge_error_bound(base, product, result, "BF16", terms=4)

    assert found[0] == 2**-7 + gamma(6, 2**-24) * 2.5
    in_double = merge_error_bound(base, product, result, "F64", terms=4)
    assert in_double[0] == 2**-52 + gamma(6, 2**-53) * 2.5


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_merging_in_float32_and_rounding_once_stays_within_the_bound(dtype):
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(50, 16, generator=g), torch.randn(16, 70, generator=g)
    base = torch.randn(50, 70, generator=g).to(TORCH[dtype])
    scale = 0.3

    merged = (base.float() + scale * (b @ a)).to(TORCH[dtype])

    exact = base.double() + scale * (b.double() @ a.double())
    error = (merged.double() - exact).abs()
    product = scale * (b.double().abs() @ a.double().abs())
    bound = merge_error_bound(base.abs().double().numpy(), product.numpy(), merged.double().numpy(), dtype, terms=16)
    bound = torch.from_numpy(bound)
    assert (error <= bound).all()
    if dtype != "F32":
        # A second rounding on the way does not fit: the bound is worth having.
        twice = (base + (scale * (b @ a)).to(TORCH[dtype])).double()
        assert ((twice - exact).abs() > bound).any()


@pytest.mark.parametrize(("dtype", "bits"), [("F16", 0x7C01), ("F64", 0x7FF0000000000001)])
def test_signalling_nans_are_widened_without_a_word(dtype: str, bits: int) -> None:
    pattern = np.array([bits], np.uint16 if dtype == "F16" else np.uint64)
    out = np.empty(1, np.float32)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        widen(pattern.view(np.float16 if dtype == "F16" else np.float64), dtype, out)

    assert np.isnan(out).all()
