"""The filters are those of orthogonal wavelets with the vanishing moments that their names promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loratools.updates.parts.wavelets import low_pass_filters

LOW_PASS = low_pass_filters()

# PEFT's tables of these are wrong, and adapters are trained with them.
PEFTS_OWN = ("coif4", "coif5")
TRUE = [name for name in LOW_PASS if name not in PEFTS_OWN]


@pytest.mark.parametrize("name", TRUE)
def test_shifts_by_two_are_orthonormal(name: str) -> None:
    low = np.array(LOW_PASS[name])

    correlated = np.correlate(low, low, "full")[low.size - 1 :: 2]

    np.testing.assert_allclose(correlated, [1.0] + [0.0] * (low.size // 2 - 1), atol=1e-9)
    assert math.isclose(low.sum(), math.sqrt(2), abs_tol=1e-9)


@pytest.mark.parametrize("name", TRUE)
def test_details_of_polynomials_vanish(name: str) -> None:
    low = np.array(LOW_PASS[name])
    family, number = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
    high = low[::-1] * (-1.0) ** np.arange(low.size)
    at = np.linspace(-1, 1, low.size)  # powers of a small number, so that rounding stays small

    for power in range(2 * number if family == "coif" else number):
        assert abs(high @ at**power) < 1e-7, power
    assert abs(high @ at ** (2 * number if family == "coif" else number)) > 1e-5


def test_filters_are_those_that_peft_trains_with() -> None:
    wavelet = pytest.importorskip("peft.tuners.waveft.wavelet")

    assert {name: tuple(wavelet.Wavelet(name).rec_lo) for name in wavelet._WAVELET_COEFFS} == LOW_PASS


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_a_filter_of_pefts_own_is_no_orthogonal_wavelet(name: str) -> None:
    assert abs(np.square(LOW_PASS[name]).sum() - 1) > 5e-3
