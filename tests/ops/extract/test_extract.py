"""extract, held against dense SVDs; refusals write nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click.testing
import factories
import pytest
import torch
from torch import Tensor

from loratools import formats
from loratools.cli import verbs
from loratools.errors import InputError, MismatchError, OutputExistsError, UnsupportedError, UsageError
from loratools.formats.common.opened_base import open_base
from loratools.ops.extract.verb import ExtractReport, extract

MODULES = factories.layered(2, {"self_attn.q_proj": (40, 24), "mlp.up_proj": (30, 24), "mlp.down_proj": (24, 28)})


def _models(
    tmp_path: Path,
    changes: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    config: Mapping[str, object] | None = None,
) -> tuple[Path, Path, dict[str, Tensor]]:
    """Base, tuned, and tuned - base in float64 of what changed; by default every matrix of a layer did."""
    weights = factories.base_weights(modules, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    if changes is None:
        changes = {f"{n}.weight": 0.1 * torch.randn(*shape, generator=generator) for n, shape in modules.items()}
    tuned = {n: (w + changes[n].to(dtype) if n in changes else w.clone()) for n, w in weights.items()}
    deltas = {n: tuned[n].double() - weights[n].double() for n in changes}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=config)
    return base, factories.checkpoint_folder(tmp_path / "tuned", weights=tuned, shards=2, config=config), deltas


def _product(report: ExtractReport, name: str) -> Tensor:
    assert report.adapter is not None
    factors = report.adapter.updates[name].factors()
    assert factors is not None
    return factors.b @ factors.a


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
def test_energy_and_error_are_those_of_the_stored_values(tmp_path: Path, dtype: str, weights: torch.dtype) -> None:
    base, tuned, deltas = _models(tmp_path, dtype=weights)

    report = extract(base, tuned, rank=5, dtype=dtype)

    assert [m.name for m in report.modules] == sorted(MODULES)
    lost = total = 0.0
    for module in report.modules:
        delta = deltas[f"{module.name}.weight"]
        residual, norm = float((delta - _product(report, module.name)).norm()), float(delta.norm())
        lost, total = lost + residual**2, total + norm**2
        assert module.error is not None
        assert module.energy is not None
        # Sums of some thousand float32 squares.
        assert module.norm == pytest.approx(norm, rel=1e-6)
        assert module.error == pytest.approx(residual / norm, rel=1e-5)
        assert module.energy == pytest.approx(1 - (residual / norm) ** 2, rel=1e-5)
        s = torch.linalg.svdvals(delta)
        best = float(s[:5].square().sum() / s.square().sum())
        # bfloat16 factors lose 2^-9 each, relative; little of which falls on the captured energy.
        assert best - 1e-4 <= module.energy <= best + 1e-6
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert report.energy == pytest.approx(1 - lost / total, rel=1e-5)
    # Two sums of the same squares in another order.
    assert report.change_captured == pytest.approx(report.energy, rel=1e-14)


@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_randomised_extraction_captures_what_exact_svd_captures(tmp_path: Path, decay: float) -> None:
    modules = {"model.layers.0.mlp.up_proj": (500, 300)}
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=torch.Generator().manual_seed(n))).Q for n in (500, 300))
    s = torch.arange(1, 301) ** -decay
    base, tuned, deltas = _models(tmp_path, {f"{n}.weight": (u * s) @ v.T for n in modules}, modules=modules)

    fast, exact = (extract(base, tuned, rank=16, exact=e) for e in (False, True))

    optimum = torch.linalg.svdvals(next(iter(deltas.values())))
    best = float(optimum[:16].square().sum() / optimum.square().sum())
    assert fast.energy is not None
    assert fast.energy >= 0.9999 * best
    assert fast.modules[0].gap_bound is not None
    assert best <= fast.energy + fast.modules[0].gap_bound + 1e-6
    assert exact.energy == pytest.approx(best, rel=1e-6)


def test_delta_of_full_rank_comes_back_to_float32_rounding(tmp_path: Path) -> None:
    base, tuned, deltas = _models(tmp_path)

    report = extract(base, tuned, rank=64, threads=1)

    assert {m.name: m.rank for m in report.modules} == {n: min(shape) for n, shape in MODULES.items()}
    assert report.error is not None
    assert report.error < 1e-5
    for name in MODULES:
        torch.testing.assert_close(_product(report, name), deltas[f"{name}.weight"], rtol=0, atol=1e-5)


def test_unchanged_weights_are_left_out_and_the_rest_is_accounted_for(tmp_path: Path) -> None:
    one = "model.layers.1.mlp.up_proj"
    changes = {
        f"{one}.weight": torch.randn(30, 24),
        "model.norm.weight": torch.full((6,), 0.5),
        "model.embed_tokens.weight": torch.full((13, 6), 0.25),
    }
    base, tuned, deltas = _models(tmp_path, changes)

    report = extract(base, tuned, rank=3, embeddings="skip")

    assert [m.name for m in report.modules] == [one]
    assert report.unchanged == len(MODULES) - 1 + 1  # and the head
    total = sum(float(d.square().sum()) for d in deltas.values())
    (skipped,), (whole,) = report.skipped, report.replacements
    assert (skipped.name, skipped.why) == ("model.embed_tokens.weight", "left out by --embeddings skip")
    assert (whole.name, whole.declared, whole.bytes) == ("model.norm.weight", "modules_to_save", 24)
    for s in (skipped, whole):
        norm = float(deltas[s.name].norm())
        assert s.norm == pytest.approx(norm, rel=1e-6)
        assert s.share == pytest.approx(norm**2 / total, rel=1e-6)
    captured = 1 - (float((deltas[f"{one}.weight"] - _product(report, one)).norm()) ** 2) / total
    assert report.change_captured == pytest.approx(captured - (skipped.share or 0), rel=1e-5)


def test_target_modules_are_short_only_where_all_layers_changed(tmp_path: Path) -> None:
    every = _models(tmp_path / "every")
    some = _models(tmp_path / "some", {"model.layers.1.mlp.up_proj.weight": torch.randn(30, 24)})

    extract(*every[:2], tmp_path / "a", rank=2)
    extract(*some[:2], tmp_path / "b", rank=2)

    listed = [json.loads((tmp_path / n / "adapter_config.json").read_text())["target_modules"] for n in "ab"]
    assert listed == [["down_proj", "q_proj", "up_proj"], ["model.layers.1.mlp.up_proj"]]
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def _spectra(modules: Mapping[str, tuple[int, int]], power: float) -> dict[str, Tensor]:
    """A change of each module with singular values i^-power times a size of its own."""
    changes = {}
    for i, (name, shape) in enumerate(modules.items()):
        generator = torch.Generator().manual_seed(i)
        k = min(shape)
        u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q for n in shape)
        changes[f"{name}.weight"] = (i + 1) * (u * torch.arange(1, k + 1) ** -power) @ v.T
    return changes


def _ranks(report: ExtractReport) -> dict[str, int | None]:
    return {m.name: m.rank for m in report.modules}


@pytest.mark.parametrize("energy", [0.8, 0.95, 1.0])
def test_an_energy_is_kept_by_the_smallest_rank(tmp_path: Path, energy: float) -> None:
    base, tuned, deltas = _models(tmp_path, _spectra(MODULES, 0.7))

    report = extract(base, tuned, tmp_path / "out", energy=energy)
    capped = extract(base, tuned, energy=energy, max_rank=3)

    for module in report.modules:
        squares = torch.linalg.svdvals(deltas[f"{module.name}.weight"]).square()
        kept = squares.cumsum(0) / squares.sum()
        assert module.rank == int((kept < energy - 1e-9).sum()) + 1
        assert module.energy is not None
        assert module.energy >= energy - 1e-6
    assert set(_ranks(capped).values()) == {3}
    assert any("keep less than asked for" in w for w in capped.warnings)
    loaded = formats.load(tmp_path / "out")
    assert {n: u.rank for n, u in loaded.updates.items()} == _ranks(report)


def test_an_error_is_kept_by_the_smallest_rank(tmp_path: Path) -> None:
    base, tuned, deltas = _models(tmp_path, _spectra(MODULES, 1.0))

    report = extract(base, tuned, error=0.1)

    for module in report.modules:
        squares = torch.linalg.svdvals(deltas[f"{module.name}.weight"]).square()
        tails = 1 - squares.cumsum(0) / squares.sum()
        assert module.rank == int((tails > 0.01).sum()) + 1
        assert module.error is not None
        assert module.error <= 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("room", [700, 3000, 10**7])
def test_limits_of_all_share_ranks_out_by_singular_values(tmp_path: Path, room: int, dtype: str) -> None:
    base, tuned, deltas = _models(tmp_path, _spectra(MODULES, 0.7))

    report = extract(base, tuned, max_params=room, dtype=dtype)
    sized = extract(base, tuned, tmp_path / "out", max_size=20_000, dtype=dtype)

    # The greedy choice, one unit at a time: of what is affordable, what captures most for what it costs.
    spectra = {n: torch.linalg.svdvals(deltas[f"{n}.weight"]).tolist() for n in MODULES}
    ranks = dict.fromkeys(MODULES, 1)
    units = sorted(((s * s / sum(MODULES[n]), n) for n, values in spectra.items() for s in values[1:]), reverse=True)
    left, done = room - sum(sum(shape) for shape in MODULES.values()), set[str]()
    for _, name in units:
        if name not in done and sum(MODULES[name]) <= left:
            ranks[name], left = ranks[name] + 1, left - sum(MODULES[name])
        else:
            done.add(name)
    assert _ranks(report) == ranks
    assert report.bytes is not None
    assert report.bytes <= room * (4 if dtype == "float32" else 2)
    assert 15_000 < (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 20_000
    assert sized.error is not None
    for module in sized.modules:
        error = (deltas[f"{module.name}.weight"] - _product(sized, module.name)).norm()
        assert module.error == pytest.approx(float(error / deltas[f"{module.name}.weight"].norm()), rel=1e-4, abs=1e-7)


def test_a_module_that_takes_more_than_was_looked_at_is_looked_into_further(tmp_path: Path) -> None:
    modules = factories.layered(4, {"mlp.up_proj": (230, 210)})
    changes = _spectra(modules, 0.1)
    large = next(iter(changes))
    changes = {n: c * (100.0 if n == large else 0.01) for n, c in changes.items()}
    base, tuned, _ = _models(tmp_path, changes, modules=modules)

    report = extract(base, tuned, max_params=440 * 120)

    assert sorted(r or 0 for r in _ranks(report).values()) == [1, 1, 1, 117]


def test_a_limit_of_all_goes_together_with_a_rule(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path, _spectra(MODULES, 0.7))

    free = extract(base, tuned, energy=0.8)
    tight = extract(base, tuned, energy=0.8, max_params=2000)
    wide = extract(base, tuned, energy=0.8, max_params=10**6)

    assert _ranks(wide) == _ranks(free)
    assert all((t or 0) <= (f or 0) for t, f in zip(_ranks(tight).values(), _ranks(free).values(), strict=True))
    assert sum((r or 0) * sum(MODULES[n]) for n, r in _ranks(tight).items()) <= 2000


def test_the_noise_edge_finds_the_rank_that_was_trained(tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": (400, 330)}
    (name,) = (f"{n}.weight" for n in modules)
    generator = torch.Generator().manual_seed(0)
    base_weight = (0.02 * torch.randn(400, 330, generator=generator)).bfloat16()
    u, v = (torch.linalg.qr(torch.randn(n, 12, generator=generator)).Q for n in (400, 330))
    # rms(delta) = 3e-2 rms(W), all twelve directions of one size.
    delta = 3e-2 * 0.02 * (400 * 330 / 12) ** 0.5 * u @ v.T
    base = factories.checkpoint_folder(tmp_path / "base", weights={name: base_weight})
    tuned = (base_weight.float() + delta).bfloat16()
    after = factories.checkpoint_folder(tmp_path / "tuned", weights={name: tuned})
    wide = factories.checkpoint_folder(tmp_path / "wide", weights={name: tuned.float()})

    report = extract(base, after, noise_edge=True)
    widened = extract(base, wide, noise_edge=True)

    assert [m.rank for m in report.modules] == [m.rank for m in widened.modules] == [12]
    # By the definition of the spacing of bfloat16, 2^-7 times the power of two below.
    spacing = 2.0 ** (torch.floor(torch.log2(tuned.double().abs())) - 7)
    noise = float((spacing.square() / 12).mean().sqrt())
    assert report.modules[0].noise_edge == pytest.approx(noise * (400**0.5 + 330**0.5), rel=0.02)
    assert report.modules[0].identical == pytest.approx(float((tuned == base_weight).float().mean()))


def test_updates_below_the_rounding_of_bfloat16_are_warned_of(tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": (200, 160)}
    change = {
        f"{n}.weight": 2e-3 * torch.randn(s, generator=torch.Generator().manual_seed(1)) for n, s in modules.items()
    }
    base, tuned, _ = _models(tmp_path, change, modules=modules, dtype=torch.bfloat16)

    report = extract(base, tuned, rank=16)

    assert report.identical is not None
    assert 0.5 < report.identical < 0.99
    assert any("bit for bit" in w for w in report.warnings)
    # White noise: no low rank holds it, and a sparse difference is smaller than the whole.
    assert any("is not of low rank" in w for w in report.warnings)


def test_extracting_what_was_merged_gives_it_back(tmp_path: Path) -> None:
    from loratools.ops.merge.verb import merge

    base, tuned, deltas = _models(tmp_path)

    extract(base, tuned, tmp_path / "adapter", rank=64)
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")

    for name, tensor in _tensors(tmp_path / "merged").items():
        wanted = _tensors(tuned)[name].read()  # type: ignore[attr-defined]
        torch.testing.assert_close(tensor.read(), wanted, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
    again = extract(base, tmp_path / "merged", rank=64)
    for module in MODULES:
        torch.testing.assert_close(_product(again, module), deltas[f"{module}.weight"], rtol=0, atol=2e-5)


def test_an_adapter_that_was_merged_comes_back_to_the_noise_of_rounding(tmp_path: Path) -> None:
    from loratools.ops.merge.verb import merge

    name, (rows, columns) = "model.layers.0.mlp.up_proj", (260, 210)
    generator = torch.Generator().manual_seed(4)
    weights = {f"{name}.weight": (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    b, a = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
    b *= 5e-2 * 0.02 / 2  # rms(delta) is 5e-2 rms(W)
    adapter = factories.adapter_folder(tmp_path / "adapter", rank=4, alpha=4, values={name: (a, b)})

    merge(base, adapter, tmp_path / "merged")
    report = extract(base, tmp_path / "merged", noise_edge=True)

    (module,) = report.modules
    assert module.rank == 4
    assert module.noise_edge is not None
    noise = module.noise_edge / (rows**0.5 + columns**0.5)
    missed = float((_product(report, name) - b.double() @ a.double()).norm())
    # White noise leaves r (m + n - r) of its m n degrees of freedom in the tangent space of matrices of rank r.
    assert missed == pytest.approx(noise * (4 * (rows + columns - 4)) ** 0.5, rel=0.15)


def test_another_format_holds_the_same_products(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path)

    extract(base, tuned, tmp_path / "peft", rank=3)
    extract(base, tuned, tmp_path / "mlx", rank=3, format="mlx")

    peft, mlx = (formats.load(tmp_path / name, base=open_base(base)) for name in ("peft", "mlx"))
    assert (peft.format, mlx.format) == ("peft", "mlx")
    assert peft.updates.keys() == mlx.updates.keys() == MODULES.keys()
    for name, update in peft.updates.items():
        one, other = update.factors(), mlx.updates[name].factors()
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.b @ one.a, other.b @ other.a, rtol=1e-12, atol=0)
    with pytest.raises(UsageError, match="no format"):
        extract(base, tuned, tmp_path / "out", rank=3, format="nonsense")


def test_what_a_format_cannot_hold_is_said_before_anything_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, _ = _models(tmp_path)
    weights = {n: w + 1 for n, w in factories.base_weights(MODULES).items() if "norm" in n or "q_proj" in n}
    tuned = factories.checkpoint_folder(tmp_path / "norms", weights=factories.base_weights(MODULES) | weights)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was decomposed")

    with monkeypatch.context() as patched:
        patched.setattr("loratools.ops.extract.work.decomposed", never)
        with pytest.raises(UnsupportedError, match="cannot be written as mlx") as caught:
            extract(base, tuned, tmp_path / "out", rank=3, format="mlx")

    norms = {name for name in weights if "norm" in name}
    assert {line.partition(":")[0] for line in caught.value.details} == norms
    planned = extract(base, tuned, tmp_path / "out", rank=3, format="mlx", plan=True)
    assert any("cannot be written as mlx, should it have changed" in text for text in planned.warnings)
    extract(
        base, tuned, tmp_path / "out", rank=3, format="mlx", exclude=sorted(n.removesuffix(".weight") for n in norms)
    )
    assert formats.detect(tmp_path / "out") == ["mlx"]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_sides_of_different_dtypes_and_shards_line_up(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weights = factories.base_weights(MODULES)
    before = {n: w.to(dtypes[0]) for n, w in weights.items()}
    after = {n: (w + (0.1 if n.endswith("proj.weight") else 0)).to(dtypes[1]) for n, w in weights.items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=before, shards=3)
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights=after, shards=2)

    report = extract(base, tuned, rank=99, include=["*_proj"])

    for name in MODULES:
        delta = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(_product(report, name), delta, rtol=0, atol=1e-5)


def test_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    modules = factories.layered(3, {"mlp.up_proj": (260, 300), "mlp.down_proj": (280, 250)})
    base, tuned, _ = _models(tmp_path, modules=modules)
    before = torch.get_num_threads()

    for threads in (1, 2):
        extract(base, tuned, tmp_path / f"out{threads}", rank=4, threads=threads)
        extract(base, tuned, tmp_path / f"shared{threads}", max_params=10_000, threads=threads)

    for name in ("out", "shared"):
        one, two = ((tmp_path / f"{name}{t}" / "adapter_model.safetensors").read_bytes() for t in (1, 2))
        assert one == two
    assert torch.get_num_threads() == before


def test_seed_changes_the_start_and_not_the_result(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path, modules={"model.layers.0.mlp.up_proj": (300, 260)})

    errors = [extract(base, tuned, rank=4, seed=seed).error for seed in (0, 1)]

    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_prefix_of_one_side_is_seen_through(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path)
    weights = {n.removeprefix("model."): t.read() for n, t in _tensors(tuned).items() if n.startswith("model.")}
    bare = factories.checkpoint_folder(tmp_path / "bare", weights=weights)

    there, back = extract(base, bare, rank=3), extract(bare, base, rank=3)

    assert [m.name for m in there.modules] == sorted(MODULES)
    assert [m.name for m in back.modules] == sorted(n.removeprefix("model.") for n in MODULES)
    assert there.warnings == ("the names of the fine-tuned model are read with 'model.' put before",)
    assert [(s.name, s.why, s.share) for s in there.skipped] == [("lm_head.weight", "only in the base", None)]


def _tensors(folder: Path) -> Mapping[str, object]:
    from loratools.checkpoints import open_checkpoint

    return open_checkpoint(folder).weights  # type: ignore[return-value]


def test_prefix_that_could_be_two_is_refused(tmp_path: Path) -> None:
    weights = {f"{side}.fc.weight": torch.randn(8, 6) for side in ("encoder", "decoder")}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights={"fc.weight": torch.randn(8, 6)})

    with pytest.raises(MismatchError, match="2 ways"):
        extract(base, tuned, rank=2)


def test_other_layers_and_shapes_are_refused_by_name(tmp_path: Path) -> None:
    base, _, _ = _models(tmp_path)
    weights = factories.base_weights({**MODULES, "model.layers.0.mlp.up_proj": (31, 24), "model.layers.2.x": (5, 4)})
    tuned = factories.checkpoint_folder(tmp_path / "other", weights=weights)

    with pytest.raises(MismatchError, match="2 tensors") as raised:
        extract(base, tuned, tmp_path / "out", rank=2)

    assert raised.value.details == (
        "model.layers.0.mlp.up_proj.weight   base 30x24, fine-tuned 31x24",
        "model.layers.2.x.weight   only in the fine-tuned model",
    )
    assert not (tmp_path / "out").exists()


def test_of_a_larger_vocabulary_the_new_rows_are_taken(tmp_path: Path) -> None:
    base, _, _ = _models(tmp_path, config={"vocab_size": 13})
    weights = factories.base_weights(MODULES)
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((2, 6), 3.0)])
    tuned = factories.checkpoint_folder(tmp_path / "resized", weights=weights)

    report = extract(base, tuned, rank=2)

    assert [(r.name, r.declared, r.shape) for r in report.replacements] == [
        (n, "tokens", (2, 6)) for n in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert [r.norm for r in report.replacements] == pytest.approx([(12 * 9) ** 0.5] * 2)
    assert report.adapter is not None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(report.adapter.replacements[name].tensor.read(), weights[name][13:])
        assert report.adapter.replacements[name].rows == (13, 14)
    whole = extract(base, tuned, rank=2, embeddings="full")
    assert [(r.declared, r.shape) for r in whole.replacements] == [("modules_to_save", (15, 6))] * 2


def test_head_with_other_labels_and_a_new_head_are_taken_whole(tmp_path: Path) -> None:
    weights = factories.base_weights(MODULES) | {"score.weight": torch.randn(2, 6)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    changed = {n: w + 1 for n, w in weights.items() if "norm" not in n and "embed" not in n}
    changed |= {n: w for n, w in weights.items() if n not in changed}
    changed |= {"score.weight": torch.randn(3, 6), "value.weight": torch.randn(1, 6), "value.bias": torch.randn(1)}
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights=changed)

    every = extract(base, tuned, rank=2)
    some = extract(base, tuned, rank=2, exclude=["score", "lm_head", "value"])

    assert [(r.name, r.norm) for r in every.replacements] == [
        (n, None) for n in ("score.weight", "value.bias", "value.weight")
    ]
    assert [m.name for m in some.modules] == sorted(MODULES)
    left_out = {s.name: s.norm for s in some.skipped}
    assert sorted(left_out) == ["lm_head.weight", "score.weight", "value.bias", "value.weight"]
    assert left_out["lm_head.weight"] == pytest.approx(78**0.5)


def test_head_that_came_loose_is_extracted_against_the_weight_it_followed(tmp_path: Path) -> None:
    weights = factories.base_weights(MODULES)
    del weights["lm_head.weight"]
    tied = {"tie_word_embeddings": True}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=tied)
    delta = torch.randn(13, 6, generator=torch.Generator().manual_seed(3))
    loose = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + delta}
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights=loose)

    report = extract(base, tuned, rank=6)

    assert [m.name for m in report.modules] == ["lm_head"]
    torch.testing.assert_close(_product(report, "lm_head").float(), delta, rtol=0, atol=1e-5)


def test_all_of_a_norm_is_stored_and_a_bias_is_declared_as_one(tmp_path: Path) -> None:
    module = "model.layers.0.fc"
    weights = {
        f"{module}.weight": torch.randn(9, 7),
        f"{module}.bias": torch.randn(9),
        "model.layers.0.norm.weight": torch.ones(7),
        "model.layers.0.norm.bias": torch.zeros(7),
        "model.layers.0.gate": torch.ones(7),
    }
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tuned = {n: w + 1 for n, w in weights.items()} | {"model.layers.0.norm.bias": torch.zeros(7)}

    report = extract(base, factories.checkpoint_folder(tmp_path / "tuned", weights=tuned), tmp_path / "out", rank=2)

    # PEFT loads a module to save as a whole, so its bias comes along though nothing changed there.
    assert [(r.name, r.declared, r.norm) for r in report.replacements] == [
        ("model.layers.0.fc.bias", "bias", pytest.approx(3.0)),
        ("model.layers.0.norm.bias", "modules_to_save", 0.0),
        ("model.layers.0.norm.weight", "modules_to_save", pytest.approx(7**0.5)),
    ]
    assert [(s.name, s.why) for s in report.skipped] == [
        ("model.layers.0.gate", "a parameter that is no module of its own")
    ]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["model.layers.0.norm"])


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path: Path, side: str, name: str) -> None:
    weights = factories.base_weights(MODULES)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights={n: w + 1 for n, w in weights.items()})
    bad = {n: t.read() for n, t in _tensors(tmp_path / side).items()}  # type: ignore[attr-defined]
    bad[name].view(-1)[3] = float("nan")
    factories.checkpoint_folder(tmp_path / side, weights=bad)

    with pytest.raises(InputError, match=f"{side}/model.*' has values that are not finite") as raised:
        extract(base, tuned, tmp_path / "out", rank=2)
    assert raised.value.details == (name,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_nothing_changed_is_an_error(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path, {})
    weights = {"a.weight": torch.randn(5, 4), "a.scale": torch.ones(3)}
    one = factories.checkpoint_folder(tmp_path / "one", weights=weights)
    other = factories.checkpoint_folder(tmp_path / "other", weights=weights | {"a.scale": torch.zeros(3)})

    with pytest.raises(InputError, match="nothing changed"):
        extract(base, tuned, rank=2)
    with pytest.raises(InputError, match="nothing of") as raised:
        extract(one, other, rank=2)
    assert raised.value.details == ("a.scale   a parameter that is no module of its own",)


def test_a_checkpoint_whose_packed_parts_do_not_fit_each_other_is_refused_by_its_scheme(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path)
    weights = factories.base_weights(MODULES)
    packed = {f"{n}.qweight": torch.ones(3, 10, dtype=torch.int32) for n in MODULES}
    packed |= {f"{n}.scales": torch.ones(3, 10) for n in MODULES} | {f"{n}.qzeros": p for n in MODULES for p in [
        torch.ones(3, 2, dtype=torch.int32)]}  # fmt: skip
    packed |= {f"{n}.g_idx": torch.zeros(24, dtype=torch.int32) for n in MODULES}
    folder = factories.checkpoint_folder(
        tmp_path / "gptq",
        weights={n: w for n, w in weights.items() if "layers" not in n} | packed,
        config={"quantization_config": {"quant_method": "gptq", "bits": 4}},
    )

    with pytest.raises(UnsupportedError, match="gptq"):
        extract(folder, tuned, rank=2)
    with pytest.raises(UnsupportedError, match="gptq"):
        extract(base, folder, rank=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "not positive"),
        ({"tolerance": 2.0}, "tolerance"),
        ({"dtype": "int8"}, "cannot be stored"),
        ({"include": ["x"]}, "none of"),
        ({"rank": None}, "no rank"),
        ({"energy": 0.5}, "exclude each other"),
        ({"noise_edge": True}, "exclude each other"),
        ({"energy": 95.0, "rank": None}, "no share"),
        ({"max_params": 3}, "too little: rank 1 in each of 6 changed modules takes"),
        ({"max_size": 100}, "too little"),
        ({"max_rank": 0}, "not positive"),
        ({"device": "quantum"}, "cannot be used"),
    ],
)
def test_wrong_arguments_are_usage_errors(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    base, tuned, _ = _models(tmp_path)

    with pytest.raises(UsageError, match=message):
        extract(base, tuned, **{"rank": 2, **arguments})  # type: ignore[arg-type]


def test_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path)

    with pytest.raises(OutputExistsError):
        extract(base, tuned, tuned, rank=2, overwrite=True)


def test_plan_knows_ranks_bytes_and_cost_and_writes_nothing(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path)

    planned = extract(base, tuned, tmp_path / "out", rank=26, plan=True, include=["*_proj"])
    by_value = extract(base, tuned, energy=0.9, plan=True)
    done = extract(base, tuned, rank=26)

    assert not (tmp_path / "out").exists()
    assert [(m.name, m.rank, m.shape) for m in planned.modules] == [(m.name, m.rank, m.shape) for m in done.modules]
    assert planned.bytes == done.bytes
    assert planned.cost is not None
    assert planned.cost.memory > 100_000_000
    assert 0 < planned.cost.seconds < 10
    assert (by_value.modules[0].rank, by_value.bytes) == (None, None)
    assert {r.name for r in by_value.replacements} == {"model.norm.weight"}


def test_command_prints_json_and_a_summary_and_exits_as_documented(tmp_path: Path) -> None:
    changes = {"model.layers.0.mlp.up_proj.weight": torch.randn(30, 24), "model.norm.weight": torch.ones(6)}
    base, tuned, _ = _models(tmp_path, changes)
    runner = click.testing.CliRunner()

    def run(*arguments: str) -> click.testing.Result:
        return runner.invoke(verbs, ["extract", str(base), *arguments])

    told = run(str(tuned), "-o", str(tmp_path / "out"), "--rank", "4")
    document = run(str(tuned), "-o", str(tmp_path / "out2"), "--rank", "4", "--json", "--dtype", "bf16")
    plan = run(str(tuned), "-o", str(tmp_path / "out3"), "--rank", "4", "--plan")
    same = run(str(base), "-o", str(tmp_path / "out3"), "--rank", "4", "--json")
    exists = run(str(tuned), "-o", str(tmp_path / "out"), "--rank", "4")
    absent = run(str(tmp_path / "nowhere"), "-o", str(tmp_path / "out3"), "--rank", "4")

    assert told.exit_code == 0, told.stderr
    assert told.stdout == ""
    assert "1 tensor, as the fine-tune has them, 24 bytes" in told.stderr
    assert "1 module, rank 4" in told.stderr
    body = json.loads(document.stdout)
    assert set(body["modules"][0]) == {
        *("name", "rank", "shape", "energy", "error", "gap_bound", "gap_estimate", "norm", "identical", "noise_edge"),
        "quantization_error",
    }
    assert [(r["name"], r["declared"]) for r in body["replacements"]] == [("model.norm.weight", "modules_to_save")]
    assert body["output"] == str(tmp_path / "out2")
    assert {t.dtype for t in formats.load(tmp_path / "out2").tensors().values()} == {"BF16", "F32"}
    assert "model.layers.0.mlp.up_proj" in plan.stdout
    assert "memory" in plan.stdout
    assert (same.exit_code, json.loads(same.stdout)["error"]["code"]) == (4, "input")
    assert (exists.exit_code, absent.exit_code) == (2, 2)
    assert not (tmp_path / "out3").exists()
