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
from loratools.ops.extract import ExtractReport, extract

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
    assert report.change_captured == report.energy


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


def test_unchanged_weights_are_left_out_and_the_rest_is_listed(tmp_path: Path) -> None:
    one = "model.layers.1.mlp.up_proj"
    changes = {
        f"{one}.weight": torch.randn(30, 24),
        "model.norm.weight": torch.full((6,), 0.5),
        "model.embed_tokens.weight": torch.full((13, 6), 0.25),
    }
    base, tuned, deltas = _models(tmp_path, changes)

    report = extract(base, tuned, rank=3)

    assert [m.name for m in report.modules] == [one]
    assert report.unchanged == len(MODULES) - 1 + 1  # and the head
    total = sum(float(d.square().sum()) for d in deltas.values())
    assert [(s.name, s.why) for s in report.skipped] == [
        ("model.embed_tokens.weight", "an embedding"),
        ("model.norm.weight", "a vector, as of a norm"),
    ]
    for s in report.skipped:
        norm = float(deltas[s.name].norm())
        assert s.norm == pytest.approx(norm, rel=1e-6)
        assert s.share == pytest.approx(norm**2 / total, rel=1e-6)
    captured = 1 - (float((deltas[f"{one}.weight"] - _product(report, one)).norm()) ** 2) / total
    assert report.change_captured == pytest.approx(captured - sum(s.share or 0 for s in report.skipped), rel=1e-5)


def test_target_modules_are_short_only_where_all_layers_changed(tmp_path: Path) -> None:
    every = _models(tmp_path / "every")
    some = _models(tmp_path / "some", {"model.layers.1.mlp.up_proj.weight": torch.randn(30, 24)})

    extract(*every[:2], tmp_path / "a", rank=2)
    extract(*some[:2], tmp_path / "b", rank=2)

    listed = [json.loads((tmp_path / n / "adapter_config.json").read_text())["target_modules"] for n in "ab"]
    assert listed == [["down_proj", "q_proj", "up_proj"], ["model.layers.1.mlp.up_proj"]]
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    modules = factories.layered(3, {"mlp.up_proj": (260, 300), "mlp.down_proj": (280, 250)})
    base, tuned, _ = _models(tmp_path, modules=modules)
    before = torch.get_num_threads()

    for threads in (1, 2):
        extract(base, tuned, tmp_path / f"out{threads}", rank=4, threads=threads)

    one, two = ((tmp_path / f"out{t}" / "adapter_model.safetensors").read_bytes() for t in (1, 2))
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


def test_resized_vocabulary_is_listed(tmp_path: Path) -> None:
    base, _, _ = _models(tmp_path)
    weights = factories.base_weights(MODULES)
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((2, 6), 3.0)])
    tuned = factories.checkpoint_folder(tmp_path / "resized", weights=weights)

    report = extract(base, tuned, rank=2)

    assert [(s.name, s.why) for s in report.skipped] == [
        (n, "resized vocabulary, 13 rows and 15 in the fine-tuned model")
        for n in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert [s.norm for s in report.skipped] == pytest.approx([(12 * 9) ** 0.5] * 2)


def test_replaced_head_is_refused_unless_excluded(tmp_path: Path) -> None:
    weights = factories.base_weights(MODULES) | {"score.weight": torch.randn(2, 6)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    changed = {n: w + 1 for n, w in weights.items()} | {"score.weight": torch.randn(3, 6)}
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights=changed)

    with pytest.raises(MismatchError, match="1 tensor"):
        extract(base, tuned, rank=2)
    report = extract(base, tuned, rank=2, exclude=["score", "lm_head"])

    assert [m.name for m in report.modules] == sorted(MODULES)
    left_out = [s for s in report.skipped if "--exclude" in s.why]
    assert [s.name for s in left_out] == ["lm_head.weight", "score.weight"]
    assert left_out[0].norm == pytest.approx(78**0.5)


def test_tied_head_is_not_extracted(tmp_path: Path) -> None:
    weights = factories.base_weights(MODULES)
    del weights["lm_head.weight"]
    tied = {"tie_word_embeddings": True}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=tied)
    loose = {n: w + 1 for n, w in weights.items()} | {"lm_head.weight": weights["model.embed_tokens.weight"] + 2}
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights=loose)

    report = extract(base, tuned, rank=2)

    assert [m.name for m in report.modules] == sorted(MODULES)
    assert {s.name: s.why for s in report.skipped}["lm_head.weight"] == "tied to model.embed_tokens.weight"


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path: Path, side: str, name: str) -> None:
    weights = factories.base_weights(MODULES)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights={n: w + 1 for n, w in weights.items()})
    bad = {n: t.read() for n, t in _tensors(tmp_path / side).items()}  # type: ignore[attr-defined]
    bad[name].view(-1)[3] = float("nan")
    factories.checkpoint_folder(tmp_path / side, weights=bad)

    with pytest.raises(InputError, match=f"'{name}' has values that are not finite"):
        extract(base, tuned, tmp_path / "out", rank=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_nothing_changed_is_an_error(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path, {})
    norm_only = _models(tmp_path / "norm", {"model.norm.weight": torch.ones(6)})

    with pytest.raises(InputError, match="nothing changed"):
        extract(base, tuned, rank=2)
    with pytest.raises(InputError, match="no linear weight") as raised:
        extract(*norm_only[:2], rank=2)
    assert raised.value.details == ("model.norm.weight   a vector, as of a norm",)


def test_quantised_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
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


def test_plan_knows_ranks_and_bytes_and_writes_nothing(tmp_path: Path) -> None:
    base, tuned, _ = _models(tmp_path)

    planned = extract(base, tuned, tmp_path / "out", rank=26, plan=True, exclude=["lm_head"])
    done = extract(base, tuned, rank=26)

    assert not (tmp_path / "out").exists()
    assert [(m.name, m.rank) for m in planned.modules] == [(m.name, m.rank) for m in done.modules]
    assert planned.bytes == done.bytes


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
    assert "warning: not extracted: model.norm.weight (a vector, as of a norm, norm 2.449, " in told.stderr
    assert "1 module, rank 4" in told.stderr
    body = json.loads(document.stdout)
    assert set(body["modules"][0]) == {"name", "rank", "energy", "error", "gap_bound", "gap_estimate", "norm"}
    assert [s["name"] for s in body["skipped"]] == ["model.norm.weight"]
    assert body["output"] == str(tmp_path / "out2")
    assert {t.dtype for t in formats.load(tmp_path / "out2").tensors().values()} == {"BF16"}
    assert "model.layers.0.mlp.up_proj" in plan.stdout
    assert (same.exit_code, json.loads(same.stdout)["error"]["code"]) == (4, "input")
    assert (exists.exit_code, absent.exit_code) == (2, 2)
    assert not (tmp_path / "out3").exists()
