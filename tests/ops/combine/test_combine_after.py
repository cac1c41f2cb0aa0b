"""What may follow a method: calibration, norms, residuals; and what the report says of each adapter."""

from __future__ import annotations

import math
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from loratools import formats
from loratools.adapter import Adapter
from loratools.algebra.calibration import calibrated
from loratools.algebra.lowrank import Factors, Svd
from loratools.errors import UsageError
from loratools.ops.combine.verb import combine
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA


def _factors(rank: int, seed: int, shape: tuple[int, int] = (12, 9)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return Factors(b, torch.randn(rank, shape[1], generator=generator, dtype=torch.float64))


def _adapter(*modules: Factors) -> Adapter:
    return Adapter(
        {f"m{i}": LoRA(from_torch(f.a), from_torch(f.b), float(f.rank), "config") for i, f in enumerate(modules)}
    )


def _dense(adapter: Adapter | None, name: str = "m0") -> Tensor:
    assert adapter is not None
    update = adapter.updates[name]
    assert isinstance(update, LoRA)
    return update.b.read() @ update.a.read() * update.scale


def _svc(merged: Tensor, own: list[Tensor]) -> Tensor:
    u, s, vt = torch.linalg.svd(merged, full_matrices=False)
    scaled = torch.zeros_like(merged)
    for r in range(len(s)):
        total = 0.0
        for delta in own:
            a = u[:, r] @ delta
            total += max(1.0, float((s[r] * vt[r]) @ a / (a @ a)))
        scaled += s[r] * len(own) / total * torch.outer(u[:, r], vt[r])
    return scaled


@pytest.mark.parametrize(("method", "options"), [("linear", {}), ("tsv", {}), ("ties", {})])
def test_svc_is_its_formula_on_dense_matrices(method: str, options: dict[str, object]) -> None:
    one, two = _factors(2, 1), _factors(3, 2)
    pair = [(_adapter(one), 1.0), (_adapter(two), 1.5)]
    limit = {"rank": 9} if method == "ties" else {}

    plain = combine(pair, method=method, options=options, **limit)  # type: ignore[arg-type]
    found = combine(pair, method=method, options=options, calibrate="svc", **limit)  # type: ignore[arg-type]

    wanted = _svc(_dense(plain.adapter), [one.b @ one.a, two.b @ two.a])
    torch.testing.assert_close(_dense(found.adapter), wanted, rtol=1e-8, atol=1e-8)


def test_svc_brings_back_what_two_equal_adapters_repeat() -> None:
    one = _factors(3, 1)
    u, s, vt = torch.linalg.svd(2 * one.b @ one.a, full_matrices=False)

    found = calibrated(Svd(u[:, :3], s[:3], vt[:3]), [one, one])

    torch.testing.assert_close((found.u * found.s) @ found.vt, one.b @ one.a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "more"), [("linear", {}), ("iso", {}), ("ties", {"rank": 9})])
def test_norm_match_gives_each_module_the_weighted_norms_of_its_adapters(method: str, more: dict[str, int]) -> None:
    one, two = _factors(2, 1), _factors(3, 2)

    report = combine([(_adapter(one), 0.5), (_adapter(two), -2.0)], method=method, norm_match=True, **more)  # type: ignore

    wanted = 0.5 * float((one.b @ one.a).norm()) + 2 * float((two.b @ two.a).norm())
    assert float(_dense(report.adapter).norm()) == pytest.approx(wanted, rel=1e-10)


def test_residual_completes_what_the_rank_cut_off(tmp_path: Path) -> None:
    one, two = (factories.adapter_folder(tmp_path / str(i), seed=i, dtype=torch.float64) for i in (1, 2))

    report = combine([one, (two, 0.5)], tmp_path / "out", rank=2, residual=tmp_path / "rest")

    assert report.residual == tmp_path / "rest"
    first, second, out, rest = (formats.load(p) for p in (one, two, tmp_path / "out", tmp_path / "rest"))
    for name in factories.MODULES:
        wanted = _dense(first, name) + 0.5 * _dense(second, name)
        assert float((_dense(out, name) - wanted).norm()) > 0.1 * float(wanted.norm())
        torch.testing.assert_close(_dense(out, name) + _dense(rest, name), wanted, rtol=1e-10, atol=1e-10)
        assert rest.updates[name].rank == min(8, *factories.MODULES[name]) - 2


def test_fedex_and_its_residual_are_the_exact_mean(tmp_path: Path) -> None:
    one, two = _factors(3, 1), _factors(3, 2)

    combine([(_adapter(one), 0.5), (_adapter(two), 0.5)], tmp_path / "out", method="fedex", residual=tmp_path / "rest")

    out, rest = formats.load(tmp_path / "out"), formats.load(tmp_path / "rest")
    assert out.updates["m0"].rank == 3
    mean = 0.25 * (one.b + two.b) @ (one.a + two.a)
    torch.testing.assert_close(_dense(out), mean, rtol=1e-10, atol=1e-10)
    wanted = 0.5 * (one.b @ one.a + two.b @ two.a)
    torch.testing.assert_close(_dense(out) + _dense(rest), wanted, rtol=1e-10, atol=1e-10)


def test_residual_of_nothing_is_not_written_and_one_without_rank_is_refused(tmp_path: Path) -> None:
    pair = [_adapter(_factors(2, 1)), _adapter(_factors(3, 2))]

    report = combine(pair, tmp_path / "out", residual=tmp_path / "rest")

    assert report.residual is None
    assert not (tmp_path / "rest").exists()
    assert any("no residual" in w for w in report.warnings)
    with pytest.raises(UsageError, match="not of low rank"):
        combine(pair, method="ties", rank=2, residual=tmp_path / "rest")


@pytest.mark.parametrize(
    ("method", "more"), [("linear", {"rank": 2}), ("tsv", {"rank": 2}), ("ties", {"rank": 3}), ("linear", {})]
)
def test_report_is_what_dense_matrices_say(method: str, more: dict[str, int]) -> None:
    pairs = [(_factors(2, 1), _factors(1, 3, (8, 11))), (_factors(3, 2), _factors(2, 4, (8, 11)))]
    weights = (0.75, 1.5)
    sources = [(_adapter(*modules), w) for modules, w in zip(pairs, weights, strict=True)]

    report = combine(sources, method=method, **more)  # type: ignore[arg-type]
    whole = combine(sources, method=method, rank=9)

    for i, share in enumerate(report.adapters):
        inner = before = norm = lost = overlap = baseline = 0.0
        for k, name in enumerate(("m0", "m1")):
            own = pairs[i][k].b @ pairs[i][k].a
            found, wanted = _dense(report.adapter, name), _dense(whole.adapter, name)
            rows = torch.linalg.svd(own).Vh[: pairs[i][k].rank]
            others = torch.linalg.svd(pairs[1 - i][k].b @ pairs[1 - i][k].a).Vh[: pairs[1 - i][k].rank]
            sizes = (len(rows), len(others))
            ours = report.modules[k].adapters[i]
            assert ours.gain == pytest.approx(float((own * found).sum() / own.square().sum()), rel=1e-9)
            assert ours.overlap == pytest.approx(float((rows @ others.T).square().sum()) / min(sizes), rel=1e-9)
            assert ours.overlap_baseline == pytest.approx(max(sizes) / own.shape[1])
            inner += float((own * found).sum())
            before += float((own * wanted).sum())
            norm += float(own.square().sum())
            lost += float(((found - own) @ rows.T).square().sum())
            overlap += ours.overlap / 2
            baseline += ours.overlap_baseline / 2
        assert share.gain == pytest.approx(inner / norm, rel=1e-9)
        assert share.gain_lost == pytest.approx((before - inner) / norm, rel=1e-6, abs=1e-9)
        assert share.interference == pytest.approx(math.sqrt(lost / norm), rel=1e-9)
        assert share.overlap == pytest.approx(overlap, rel=1e-9)
        assert share.overlap_baseline == pytest.approx(baseline, rel=1e-9)


def test_overlap_at_random_is_its_baseline() -> None:
    draws = []
    for seed in range(60):
        pair = [_adapter(_factors(r, 2 * seed + r, (30, 40))) for r in (2, 3)]
        draws.append(combine(pair, plan=True).adapters[0])

    mean = sum(d.overlap or 0.0 for d in draws) / len(draws)
    assert draws[0].overlap_baseline == 3 / 40
    # The spread of one draw is about 0.04.
    assert mean == pytest.approx(3 / 40, abs=0.02)


@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_seeds_and_threads(tmp_path: Path, space: str) -> None:
    sources = [factories.adapter_folder(tmp_path / str(i), seed=i) for i in range(3)]

    def made(name: str, **more: object) -> bytes:
        combine(sources, tmp_path / name, method="dare", options={"space": space}, rank=3, **more)  # type: ignore
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()[-400:]

    assert made("a", seed=1, threads=1) == made("b", seed=1, threads=3)
    assert made("c", seed=2) != made("a2", seed=1)


def test_a_residual_in_place_of_the_combination_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pair = [_adapter(_factors(2, 1)), _adapter(_factors(3, 2))]

    for place in ("out", "out/rest", "other/../out"):
        with pytest.raises(UsageError, match="over the combination"):
            combine(pair, tmp_path / "out", rank=2, residual=tmp_path / place, overwrite=True)

    assert list(tmp_path.iterdir()) == []
