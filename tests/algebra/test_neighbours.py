"""Choosing between the two neighbours of a number, against the grid itself and against plain loops in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from loratools.algebra.neighbours import (
    MeasuredMetric,
    SubspaceMetric,
    feedback_choice,
    float_neighbours,
    orthonormal_rows,
    random_fractions,
    stochastic_choice,
    with_unit_mean,
)

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


def grid(dtype: str) -> np.ndarray:
    """All finite numbers of a 16-bit dtype, sorted, as torch reads their bits."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(TORCH[dtype])
    return np.unique(numbers.double().numpy()[np.isfinite(numbers.double().numpy())])


def samples(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    numbers = grid(dtype)
    middle = numbers[len(numbers) // 4 : -len(numbers) // 4]
    on_grid = rng.choice(middle, 300)
    close = rng.choice(middle, 300) * (1 + rng.normal(size=300) * 1e-4)
    return np.concatenate([[0.0, -0.0, numbers[-1], numbers[0]], on_grid, close, rng.normal(size=400) * 0.02])


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_neighbours_are_the_numbers_of_the_grid_below_and_above(dtype: str, wide: type) -> None:
    values = samples(dtype).astype(wide)

    low, high = float_neighbours(values, dtype)

    numbers = grid(dtype)
    np.testing.assert_array_equal(low, numbers[np.searchsorted(numbers, values, side="right") - 1])
    np.testing.assert_array_equal(high, numbers[np.searchsorted(numbers, values, side="left")])


def test_a_double_just_beside_a_number_of_the_grid_is_not_on_it() -> None:
    values = np.array([1 + 2.0**-50, 1 - 2.0**-50, -1 - 2.0**-50])

    low, high = float_neighbours(values, "BF16")

    np.testing.assert_array_equal(low, [1, 1 - 2.0**-8, -1 - 2.0**-7])
    np.testing.assert_array_equal(high, [1 + 2.0**-7, 1, -1])


def test_random_numbers_belong_to_the_element_and_not_to_the_block() -> None:
    together = random_fractions("7 name", 0, 1001)

    for cuts in ([0, 1, 8, 9, 500, 1001], [0, 333, 1001]):
        pieces = [random_fractions("7 name", a, b - a) for a, b in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), together)
    assert (random_fractions("8 name", 0, 1001) != together).mean() > 0.99
    assert ((together >= 0) & (together < 1)).all()


def test_random_numbers_are_uniform() -> None:
    drawn = random_fractions("0 weight", 0, 1 << 18)

    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    # Chi-square with 63 degrees of freedom: 130 is beyond the 1e-6 quantile.
    assert ((counts - 4096) ** 2 / 4096).sum() < 130


def test_the_expected_value_of_stochastic_rounding_is_the_value() -> None:
    value, draws = np.float32(1 + 0.3 * 2**-7), 1 << 18
    values = np.full(draws, value)
    low, high = float_neighbours(values, "BF16")

    upper = stochastic_choice(values, low, high, random_fractions("1 w", 0, draws))

    # The share that goes up is 0.3, with a standard error of sqrt(.3 * .7 / n) < 0.0009.
    assert abs(upper.mean() - 0.3) < 0.0036
    assert abs(np.where(upper, high, low).mean(dtype=np.float64) - value) < 4 * 0.0009 * 2**-7


def test_numbers_on_the_grid_stay_there() -> None:
    values = np.array([0.0, 1.0, -2.5], np.float32)
    low, high = float_neighbours(values, "BF16")

    upper = stochastic_choice(values, low, high, np.zeros(3, np.float32))

    np.testing.assert_array_equal(np.where(upper, high, low), values)


def greedy(low: np.ndarray, high: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """One input after the other, for each output, the error with the smaller e^2 H_jj + 2 e sum_i<j H_ji e_i."""
    inputs, outputs = low.shape
    upper = np.zeros((inputs, outputs), bool)
    for o in range(outputs):
        errors = np.zeros(inputs)
        for j in range(inputs):
            cost = [e * e * moments[j, j] + 2 * e * (moments[j, :j] @ errors[:j]) for e in (low[j, o], high[j, o])]
            upper[j, o] = cost[1] < cost[0]
            errors[j] = (low[j, o], high[j, o])[int(cost[1] < cost[0])]
    return upper


def problem(inputs: int, outputs: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    position = rng.random((inputs, outputs))
    directions = rng.normal(size=(rank, inputs)).astype(np.float32)
    return (-position).astype(np.float32), (1 - position).astype(np.float32), directions


def test_feedback_in_a_subspace_is_the_greedy_rule_written_out() -> None:
    low, high, directions = problem(53, 11, 4)
    basis = orthonormal_rows(directions)

    upper = feedback_choice(0, low, high, SubspaceMetric(basis, 0.25, 11))

    q = np.linalg.qr(directions.T.astype(np.float64))[0]
    np.testing.assert_array_equal(upper, greedy(low.astype(float), high.astype(float), q @ q.T + 0.25 * np.eye(53)))


def test_feedback_with_measured_moments_is_the_greedy_rule_written_out() -> None:
    low, high, directions = problem(53, 11, 90)
    moments = directions.T @ directions

    upper = feedback_choice(0, low, high, MeasuredMetric(with_unit_mean(moments), 0.01, 11))

    wide = moments.astype(np.float64)
    exact = wide / (np.trace(wide) / 53) + 0.01 * np.eye(53)
    np.testing.assert_array_equal(upper, greedy(low.astype(float), high.astype(float), exact))


def test_inputs_may_come_in_several_blocks_and_outputs_in_any_number() -> None:
    low, high, directions = problem(53, 11, 4)
    basis = orthonormal_rows(directions)
    together = feedback_choice(0, low, high, SubspaceMetric(basis, 0.1, 11))

    metric = SubspaceMetric(basis, 0.1, 11)
    blocks = [feedback_choice(a, low[a:b], high[a:b], metric) for a, b in ((0, 7), (7, 40), (40, 53))]
    columns = [
        feedback_choice(0, np.ascontiguousarray(low[:, a:b]), np.ascontiguousarray(high[:, a:b]),
                        SubspaceMetric(basis, 0.1, b - a))
        for a, b in ((0, 3), (3, 11))
    ]  # fmt: skip

    np.testing.assert_array_equal(np.concatenate(blocks), together)
    np.testing.assert_array_equal(np.concatenate(columns, axis=1), together)


def test_the_basis_leaves_out_directions_that_repeat_others() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    repeated = np.concatenate([rows, rows[:1] * 2, rows[1:2] - rows[2:]])

    basis = orthonormal_rows(repeated).astype(np.float64)

    assert basis.shape == (3, 20)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-5)


def test_no_direction_gives_an_empty_basis() -> None:
    assert orthonormal_rows(np.zeros((2, 5), np.float32)).shape == (0, 5)
