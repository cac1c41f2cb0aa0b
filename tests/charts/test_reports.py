"""The charts of reports: their numbers are those of float64 arithmetic on the adapters' own tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reports are computed with it")

import factories

import loratools
from loratools.charts import charts_of
from loratools.charts.values import Bars, Chart, HeatMap, Lines

SCALE = 2.0  # alpha 8 over rank 4


def deltas(seed: int) -> dict[str, np.ndarray]:
    """`scale * B @ A` of a random adapter in float64, by module."""
    return {name: SCALE * (b.double() @ a.double()).numpy() for name, (a, b) in factories.factors(seed=seed).items()}


def titled(charts: tuple[Chart, ...], title: str) -> Chart:
    return next(chart for chart in charts if chart.title == title)


def heat_map(charts: tuple[Chart, ...], title: str) -> HeatMap:
    chart = titled(charts, title)
    assert isinstance(chart, HeatMap)
    assert chart.rows == ("layers.0", "layers.1")
    assert chart.columns == ("q_proj", "v_proj")
    return chart


def as_grid(by_module: dict[str, float]) -> np.ndarray:
    return np.array([[by_module[f"model.layers.{n}.self_attn.{k}_proj"] for k in "qv"] for n in (0, 1)])


def rank_for_90_percent(delta: np.ndarray) -> float:
    energies = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
    return float(1 + np.argmax(energies >= 0.9 * energies[-1]))


@pytest.mark.parametrize("verb", ["inspect", "spectrum"])
def test_maps_of_norm_and_rank_hold_what_the_deltas_have(verb: str, tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "a", seed=3)
    expected = deltas(3)

    report = loratools.inspect(folder, values=True) if verb == "inspect" else loratools.spectrum(folder)
    charts = charts_of(report)

    norms = as_grid({name: float(np.linalg.norm(delta)) for name, delta in expected.items()})
    ranks = as_grid({name: rank_for_90_percent(delta) for name, delta in expected.items()})
    norm = heat_map(charts, "Norm of the change")
    np.testing.assert_allclose(np.array(norm.values, dtype=float), norms, rtol=1e-6)
    assert norm.limits == pytest.approx((0, norms.max()), rel=1e-6)
    np.testing.assert_array_equal(
        np.array(heat_map(charts, "Rank that keeps 90% of the energy").values, dtype=float), ranks
    )


def test_lines_of_singular_values_are_medians_over_all_modules_and_over_each_kind(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "a", seed=3)
    relative = {}
    for name, delta in deltas(3).items():
        values = np.linalg.svd(delta, compute_uv=False)[:4]
        relative[name] = values / values[0]

    lines = titled(charts_of(loratools.spectrum(folder)), "Singular values")

    assert isinstance(lines, Lines)
    assert [series.name for series in lines.series] == ["all 4 modules", "q_proj", "v_proj"]
    for series, kind in zip(lines.series, ("", "q_proj", "v_proj"), strict=True):
        median = np.median([values for name, values in relative.items() if kind in name], axis=0)
        assert series.xs == (1, 2, 3, 4)
        np.testing.assert_allclose(np.array(series.ys, dtype=float), median, rtol=1e-5)
    np.testing.assert_allclose(lines.series[0].low, np.quantile(list(relative.values()), 0.1, axis=0), rtol=1e-5)
    np.testing.assert_allclose(lines.series[0].high, np.quantile(list(relative.values()), 0.9, axis=0), rtol=1e-5)
    assert (lines.log_x, lines.log_y) == (True, True)


def test_curve_of_ranks_is_the_energy_that_each_keeps(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "a", seed=3)
    squares = [np.linalg.svd(delta, compute_uv=False) ** 2 for delta in deltas(3).values()]
    total = sum(float(each.sum()) for each in squares)

    lines = titled(charts_of(loratools.spectrum(folder)), "What a rank keeps")

    assert isinstance(lines, Lines)
    same, _, worst = lines.series
    assert same.xs == (1, 2, 4)
    assert same.ys == pytest.approx([sum(float(e[:r].sum()) for e in squares) / total for r in (1, 2, 4)], rel=1e-6)
    assert worst.ys == pytest.approx([min(float(e[:r].sum() / e.sum()) for e in squares) for r in (1, 2, 4)], rel=1e-6)


def test_maps_and_bars_of_two_adapters_hold_their_cosines_gains_and_interferences(tmp_path: Path) -> None:
    folders = [factories.adapter_folder(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 4))]
    one, two = deltas(3), deltas(4)
    products = {name: float((one[name] * two[name]).sum()) for name in one}
    cosines = {name: p / float(np.linalg.norm(one[name]) * np.linalg.norm(two[name])) for name, p in products.items()}
    squares = [sum(float((delta**2).sum()) for delta in each.values()) for each in (one, two)]

    charts = charts_of(loratools.compare(*folders))

    cosine = heat_map(charts, "Cosine of the two changes")
    np.testing.assert_allclose(np.array(cosine.values, dtype=float), as_grid(cosines), rtol=1e-6)
    assert (cosine.diverging, cosine.limits) == (True, (-1.0, 1.0))
    bars = titled(charts, "Gain and interference in the sum of both")
    assert isinstance(bars, Bars)
    assert bars.labels == ("a", "b")
    assert bars.groups[0].values == pytest.approx([1 + sum(products.values()) / s for s in squares], rel=1e-6)
    met = []
    for own, other in ((one, two), (two, one)):
        on_own_inputs = [other[n] @ np.linalg.pinv(own[n]) @ own[n] for n in own]
        met.append(sum(float((m**2).sum()) for m in on_own_inputs) / sum(float((d**2).sum()) for d in own.values()))
    assert bars.groups[1].values == pytest.approx(np.sqrt(met), rel=1e-5)


def test_matrix_of_several_adapters_is_empty_on_its_diagonal_and_in_the_order_of_likeness(tmp_path: Path) -> None:
    seeds = {"a": 3, "b": 4, "c": 5}
    folders = [factories.adapter_folder(tmp_path / name, seed=seed) for name, seed in seeds.items()]
    flat = {name: np.concatenate([d.ravel() for d in deltas(seed).values()]) for name, seed in seeds.items()}
    report = loratools.compare(*folders)

    cosine = titled(charts_of(report), "Cosine of every two adapters")

    assert isinstance(cosine, HeatMap)
    assert cosine.rows == cosine.columns == tuple("abc"[i] for i in report.order)
    for row, values in zip(cosine.rows, cosine.values, strict=True):
        for column, value in zip(cosine.columns, values, strict=True):
            one, two = flat[row], flat[column]
            expected = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
            assert value == (None if row == column else pytest.approx(expected, abs=1e-9))


def test_states_of_one_training_have_lines_by_step(tmp_path: Path) -> None:
    seeds = {1000: 5, 20: 3, 300: 4}
    folders = [factories.adapter_folder(tmp_path / f"checkpoint-{step}", seed=seed) for step, seed in seeds.items()]
    flat = {step: np.concatenate([d.ravel() for d in deltas(seed).values()]) for step, seed in seeds.items()}

    charts = charts_of(loratools.compare(*folders))

    norms, directions = titled(charts, "Norm of the change by step"), titled(charts, "Direction of the change by step")
    assert isinstance(norms, Lines)
    assert isinstance(directions, Lines)
    assert norms.series[0].xs == (20, 300, 1000)
    assert norms.series[0].ys == pytest.approx([np.linalg.norm(flat[s]) for s in (20, 300, 1000)], rel=1e-6)
    to_last, to_previous = (
        [f @ g / np.linalg.norm(f) / np.linalg.norm(g) for f, g in pairs]
        for pairs in (
            [(flat[s], flat[1000]) for s in (20, 300, 1000)],
            [(flat[20], flat[300]), (flat[300], flat[1000])],
        )
    )
    assert directions.series[0].ys == pytest.approx(to_last, abs=1e-9)
    assert directions.series[1].ys[0] is None
    assert directions.series[1].ys[1:] == pytest.approx(to_previous, abs=1e-9)


def test_bars_of_a_combination_are_gains_and_interferences_of_its_adapters(tmp_path: Path) -> None:
    folders = [factories.adapter_folder(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 4))]
    one, two = deltas(3), deltas(4)
    result = {name: one[name] + 0.25 * two[name] for name in one}

    report = loratools.combine([(folders[0], 1.0), (folders[1], 0.25)], tmp_path / "out", plan=True)
    charts = charts_of(report)

    bars = titled(charts, "Gain and interference of each adapter")
    assert isinstance(bars, Bars)
    weights, gains, interferences = bars.groups
    assert weights.values == (1.0, 0.25)
    for own, gain, interference in zip((one, two), gains.values, interferences.values, strict=True):
        square = sum(float((d**2).sum()) for d in own.values())
        assert gain == pytest.approx(sum(float((result[n] * own[n]).sum()) for n in own) / square, rel=1e-6)
        on_own_inputs = [(result[n] - own[n]) @ np.linalg.pinv(own[n]) @ own[n] for n in own]
        assert interference == pytest.approx(
            (sum(float((m**2).sum()) for m in on_own_inputs) / square) ** 0.5, rel=1e-5
        )
    gain_of_b = heat_map(charts, "Gain of b")
    expected = as_grid({n: float((result[n] * two[n]).sum() / (two[n] ** 2).sum()) for n in two})
    np.testing.assert_allclose(np.array(gain_of_b.values, dtype=float), expected, rtol=1e-5)
    assert sum(gain_of_b.limits) / 2 == pytest.approx(0.25)


def test_merge_extraction_and_verification_map_gain_norm_and_error(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    adapter = factories.adapter_folder(tmp_path / "a", seed=3, alpha=0.5)
    merged = loratools.merge(base, [adapter], tmp_path / "merged")

    gain = heat_map(charts_of(merged), "Gain: how much of the update is in the merged weights")
    verified = charts_of(loratools.verify(tmp_path / "merged", base, [adapter]))
    extracted = charts_of(loratools.extract(base, tmp_path / "merged", tmp_path / "e", rank=2))

    assert np.array(gain.values, dtype=float) == pytest.approx(np.ones((2, 2)), abs=1e-3)
    assert heat_map(verified, "Gain: how much of the adapters is in the merged weights").diverging
    expected = {name: delta * 0.5 / 8 for name, delta in deltas(3).items()}
    norm = heat_map(extracted, "Norm of the change")
    np.testing.assert_allclose(
        np.array(norm.values, dtype=float),
        as_grid({name: float(np.linalg.norm(delta)) for name, delta in expected.items()}),
        rtol=1e-3,
    )
    error = heat_map(extracted, "Error of the extracted factors")
    lost = {}
    for name, delta in expected.items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        lost[name] = float(np.sqrt(squares[2:].sum() / squares.sum()))
    np.testing.assert_allclose(np.array(error.values, dtype=float), as_grid(lost), rtol=1e-2)


def test_reports_without_numbers_have_no_charts(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "a")

    assert charts_of(loratools.inspect(folder)) == ()
    assert charts_of(loratools.clean(tmp_path)) == ()


def test_charts_of_several_inspected_adapters_are_titled_with_their_paths(tmp_path: Path) -> None:
    folders = [factories.adapter_folder(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 4))]

    titles = [chart.title for chart in charts_of(loratools.inspect(*folders, values=True))]

    assert f"Norm of the change: {folders[0]}" in titles
    assert f"Norm of the change: {folders[1]}" in titles
