"""spectrum, held against dense SVDs in float64, and against what extract then does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import click.testing
import factories
import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.algebra.spectrum import effective_rank, effective_rank_estimate, gavish_donoho_cut
from loratools.cli import verbs
from loratools.errors import InputError, UsageError
from loratools.ops.extract.verb import extract
from loratools.ops.spectrum.verb import spectrum

MODULES = factories.layered(2, {"self_attn.q_proj": (40, 24), "mlp.up_proj": (30, 26)})


def _turned(values: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q for n in shape)
    return ((u * values) @ v.T).float()


def _models(
    tmp_path: Path, changes: Mapping[str, Tensor], modules: Mapping[str, tuple[int, int]] = MODULES
) -> tuple[Path, Path]:
    weights = factories.base_weights(modules)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tuned = {n: w + changes[n] if n in changes else w for n, w in weights.items()}
    return base, factories.checkpoint_folder(tmp_path / "tuned", weights=tuned)


def _changes(power: float = 0.7, modules: Mapping[str, tuple[int, int]] = MODULES) -> dict[str, Tensor]:
    return {
        f"{n}.weight": (i + 1) * _turned(torch.arange(1, min(shape) + 1) ** -(power + 0.1 * i), shape, i)
        for i, (n, shape) in enumerate(modules.items())
    }


def test_a_pair_has_the_singular_values_of_its_deltas(tmp_path: Path) -> None:
    changes = _changes()
    base, tuned = _models(tmp_path, changes)

    report = spectrum(tuned, base)

    assert [m.name for m in report.modules] == sorted(MODULES)
    assert report.unchanged == 2  # head and embedding
    for m in report.modules:
        s = torch.linalg.svdvals(changes[f"{m.name}.weight"].double())
        np.testing.assert_allclose(m.singular_values, s, rtol=1e-4)
        assert m.complete
        assert m.norm == pytest.approx(float(s.norm()), rel=1e-5)
        assert m.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-4)
        p = s / s.sum()
        assert m.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-4)
        assert m.numerical_rank == len(s)


def test_the_table_is_what_extract_then_reports(tmp_path: Path) -> None:
    base, tuned = _models(tmp_path, _changes())

    report = spectrum(tuned, base, max_rank=12, dtype="bfloat16")

    assert [row.rank for row in report.table] == [1, 2, 4, 8, 12]
    for row in report.table:
        done = extract(base, tuned, tmp_path / f"r{row.rank}", rank=row.rank)
        assert row.energy == pytest.approx(done.energy, rel=1e-5)
        assert row.error == pytest.approx(done.error, rel=1e-5)
        worst = min(done.modules, key=lambda m: m.energy or 0)
        assert (row.worst_module, row.worst_energy) == (worst.name, pytest.approx(worst.energy, rel=1e-5))
        half = extract(base, tuned, tmp_path / f"h{row.rank}", rank=row.rank, dtype="bfloat16")
        on_disk = (tmp_path / f"h{row.rank}" / "adapter_model.safetensors").stat().st_size
        assert half.bytes is not None
        assert half.bytes < on_disk <= row.bytes < on_disk + 4000
        shared = extract(base, tuned, max_params=half.bytes // 2)
        assert row.energy_shared == pytest.approx(shared.energy, rel=1e-4)
        assert row.energy_shared >= row.energy - 1e-9


def test_what_is_not_decomposed_is_known_from_the_norm(tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": (330, 310)}
    changes = _changes(0.5, modules)
    base, tuned = _models(tmp_path, changes, modules)

    part, whole = spectrum(tuned, base, max_rank=8), spectrum(tuned, base, max_rank=8, exact=True)

    s = torch.linalg.svdvals(next(iter(changes.values())).double())
    (m,), (exact,) = part.modules, whole.modules
    assert (m.complete, len(m.singular_values), m.numerical_rank) == (False, 8, None)
    assert (exact.complete, len(exact.singular_values), exact.numerical_rank) == (True, 310, 310)
    assert part.table[-1].energy == pytest.approx(float(s[:8].square().sum() / s.square().sum()), rel=2e-4)
    assert exact.effective_rank <= m.effective_rank <= 1.2 * exact.effective_rank


def test_an_adapter_has_the_singular_values_of_its_products(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "adapter", rank=4, alpha=8)

    report = spectrum(folder)

    made = factories.factors(rank=4)
    for m in report.modules:
        a, b = made[m.name]
        s = torch.linalg.svdvals(2.0 * b.double() @ a.double())[:4]
        np.testing.assert_allclose(m.singular_values, s, rtol=1e-10)
        assert (m.complete, m.numerical_rank, m.noise_edge, m.above_edge) == (True, 4, None, None)
    assert [row.rank for row in report.table] == [1, 2, 4]
    assert report.table[-1].energy == 1
    assert (report.knee, report.why) == (4, "rank 4 holds all of the change, to rounding")


def test_each_of_several_fused_experts_has_the_singular_values_of_its_own_product(tmp_path: Path) -> None:
    experts, rank, out, inner = 3, 2, 10, 6
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(experts * rank, inner, generator=generator)
    b = torch.randn(out, rank * experts, generator=generator)
    name = "model.layers.0.mlp.experts"
    folder = factories.adapter_folder(
        tmp_path / "adapter",
        values={name: (a, b)},
        rank=rank,
        alpha=6,
        config={"target_modules": [], "target_parameters": ["experts.up_proj"]},
    )

    report = spectrum(folder)

    assert [m.name for m in report.modules] == [f"{name}.up_proj[{i}]" for i in range(experts)]
    for i, module in enumerate(report.modules):
        # PEFT keeps the rows of A by expert, and the columns of B by rank and then by expert.
        delta = 3.0 * b[:, i::experts].double() @ a[i * rank : (i + 1) * rank].double()
        expected = torch.linalg.svdvals(delta)[:rank]
        assert module.singular_values == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_knee_is_where_twice_the_rank_is_no_use(tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": (230, 210)}
    shape = next(iter(modules.values()))
    flat = torch.arange(1, 211) ** -0.5
    kinked = torch.cat([torch.full((8,), 30.0), torch.full((202,), 1.0)])

    knees = []
    for i, values in enumerate((flat, kinked)):
        change = {f"{n}.weight": _turned(values, shape, 3) for n in modules}
        base, tuned = _models(tmp_path / str(i), change, modules)
        knees.append(spectrum(tuned, base, max_rank=64))

    assert knees[0].knee is None
    assert "no knee up to rank 64" in knees[0].why
    assert knees[1].knee == 8
    assert "rank 16 takes twice the file" in knees[1].why


def test_directions_above_the_rounding_of_bfloat16_are_counted(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(300, 260, generator=generator)).bfloat16()
    strong = _turned(torch.full((5,), 3e-2 * 0.02 * (300 * 260 / 5) ** 0.5), (300, 260), 1)
    base = factories.checkpoint_folder(tmp_path / "base", weights={name: weight})
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights={name: (weight.float() + strong).bfloat16()})

    (m,) = spectrum(tuned, base).modules

    assert m.above_edge == m.above_cut == 5
    assert m.noise_edge is not None
    assert m.singular_values[5] == pytest.approx(m.noise_edge, rel=0.1)


def test_cut_of_gavish_and_donoho() -> None:
    # Their paper: 4/sqrt(3) for a square matrix; lambda(0.5) = 2.0003... from its equation (11), worked out by hand.
    assert gavish_donoho_cut(1.0, (100, 100)) == pytest.approx(4 / math.sqrt(3) * 10)
    beta = 0.5
    by_hand = math.sqrt(2 * 1.5 + 8 * beta / (1.5 + math.sqrt(0.25 + 7 + 1)))
    assert gavish_donoho_cut(2.0, (200, 100)) == pytest.approx(2 * by_hand * math.sqrt(200))
    assert gavish_donoho_cut(2.0, (100, 200)) == gavish_donoho_cut(2.0, (200, 100))


def test_effective_rank_of_a_known_tail() -> None:
    s = torch.cat([torch.tensor([5.0, 3.0]), torch.full((10,), 0.5)])

    assert effective_rank_estimate(s[:2], 10 * 0.25, 10) == pytest.approx(effective_rank(s))
    assert effective_rank_estimate(s[:2], 0.0, 10) == effective_rank(s[:2])


def test_what_has_no_spectrum_is_an_error(tmp_path: Path) -> None:
    base, tuned = _models(tmp_path, {"model.norm.weight": torch.ones(6)})

    with pytest.raises(InputError, match="no weight of a layer"):
        spectrum(tuned, base)
    with pytest.raises(UsageError, match="not positive"):
        spectrum(tuned, base, max_rank=0)


def test_command_prints_a_plot_and_a_table_or_json(tmp_path: Path) -> None:
    base, tuned = _models(tmp_path, _changes())
    runner = click.testing.CliRunner()

    told = runner.invoke(verbs, ["spectrum", str(tuned), "--base", str(base), "--max-rank", "8", "--modules"])
    document = runner.invoke(verbs, ["spectrum", str(tuned), "--base", str(base), "--json"])
    adapter = runner.invoke(verbs, ["spectrum", str(factories.adapter_folder(tmp_path / "adapter"))])

    assert told.exit_code == 0, told.stderr
    for text in ("sigma / sigma_1", "shared out", "model.layers.1.mlp.up_proj", "knee", "•"):
        assert text in told.stdout
    body = json.loads(document.stdout)
    assert set(body["table"][0]) == {
        *("rank", "energy", "error", "worst_module", "worst_energy", "bytes", "energy_shared")
    }
    assert set(body["knee"]) == {"rank", "why"}
    assert len(body["modules"][0]["singular_values"]) == 24 or len(body["modules"][0]["singular_values"]) == 26
    assert adapter.exit_code == 0, adapter.stderr
    assert "holds all of the change" in adapter.stdout


def test_modules_without_any_change_have_a_spectrum_of_zeros(tmp_path: Path) -> None:
    name, other = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    untrained = (torch.randn(4, 20), torch.zeros(24, 4))
    zero = factories.adapter_folder(tmp_path / "zero", values={name: untrained})
    trained = (torch.randn(4, 20), torch.randn(24, 4))
    mixed = factories.adapter_folder(tmp_path / "mixed", values={name: untrained, other: trained})

    report, half = spectrum(zero), spectrum(mixed)

    assert [(m.norm, m.numerical_rank) for m in report.modules] == [(0.0, 0)]
    assert (report.knee, report.table[0].error) == (None, 0.0)
    assert "no change" in report.why
    s = torch.linalg.svdvals(trained[1].double() @ trained[0].double())
    assert half.table[0].energy == pytest.approx(float(s[0] ** 2 / s.square().sum()))
    assert half.table[0].worst_module == other


def test_a_model_without_a_base_gets_a_hint(tmp_path: Path) -> None:
    _, tuned = _models(tmp_path, _changes())

    result = click.testing.CliRunner().invoke(verbs, ["spectrum", str(tuned)])

    assert (result.exit_code, "--base" in result.stderr) == (4, True)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_the_numerical_rank_of_wide_modules_in_16_bits_is_their_rank(kind: torch.dtype, tmp_path: Path) -> None:
    # For the entries of a dense matrix of 2048 columns the usual bound is 2048 / 2048 of the largest singular value.
    wide = factories.adapter_folder(tmp_path / "wide", modules={"model.layers.0.mlp.up_proj": (1280, 2048)}, dtype=kind)

    (module,) = spectrum(wide).modules

    assert module.numerical_rank == 4
