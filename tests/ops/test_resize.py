"""resize, held against dense float64 SVDs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click.testing
import factories
import pytest
import torch
from torch import Tensor

from loratools import formats
from loratools.adapter import Adapter
from loratools.cli import verbs
from loratools.errors import InputError, OutputExistsError, UsageError
from loratools.ops.resize.verb import resize
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA


def _dense(adapter: Adapter | None, name: str) -> Tensor:
    assert adapter is not None
    factors = adapter.updates[name].factors()
    assert factors is not None
    return factors.b @ factors.a


def _source(tmp_path: Path, **options: object) -> Path:
    ranks = {"model.layers.1.self_attn.v_proj": 2}
    return factories.adapter_folder(tmp_path / "in", ranks=ranks, alpha=5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.8}, {"error": 0.3}])
def test_resize_equals_dense_svd(tmp_path: Path, rule: dict[str, float], rslora: bool) -> None:
    source = formats.load(_source(tmp_path, config={"use_rslora": rslora}))

    report = resize(source, dtype="float64", **rule)  # type: ignore[arg-type]

    for module in report.modules:
        wanted, found = _dense(source, module.name), _dense(report.adapter, module.name)
        s = torch.linalg.svdvals(wanted)
        tails = torch.cat([s.square().flip(0).cumsum(0).flip(0), torch.zeros(1)]) / s.square().sum()
        by_rule = {"rank": 3, "energy": int((tails > 0.2).sum()), "error": int((tails > 0.09).sum())}
        smallest = by_rule[next(iter(rule))]
        rank = min(smallest, source.updates[module.name].rank)
        assert (module.rank_in, module.rank) == (source.updates[module.name].rank, rank)
        # The tail of a module that was small enough is rounding, and nothing is lost there.
        tail = math.sqrt(float(tails[rank])) if rank < module.rank_in else 0.0
        assert module.error == pytest.approx(tail, rel=1e-10, abs=1e-15)
        assert float((wanted - found).norm() / wanted.norm()) == pytest.approx(tail, rel=1e-10, abs=1e-14)
        torch.testing.assert_close(torch.linalg.svdvals(found)[:rank], s[:rank], rtol=1e-10, atol=0)


def test_module_that_is_small_enough_keeps_its_bytes(tmp_path: Path) -> None:
    source = formats.load(_source(tmp_path, dtype=torch.bfloat16))

    report = resize(source, tmp_path / "out", rank=3)

    kept = "model.layers.1.self_attn.v_proj"
    assert report.unchanged == 1
    assert report.adapter is not None
    assert report.adapter.updates[kept] is source.updates[kept]
    back = formats.load(tmp_path / "out")
    assert {n: (u.rank, u.scale) for n, u in back.updates.items()} == {
        n: (2, 2.5) if n == kept else (3, 1.0) for n in factories.MODULES
    }
    assert {t.dtype for t in back.tensors().values()} == {"BF16"}


def test_larger_rank_leaves_everything_as_it_is(tmp_path: Path) -> None:
    path = _source(tmp_path, extra={"score.weight": torch.randn(3, 5)}, config={"modules_to_save": ["score"]})

    report = resize(path, tmp_path / "out", rank=64)

    assert report.unchanged == len(report.modules) == 4
    assert report.error == 0
    before, after = ((p / "adapter_model.safetensors").read_bytes() for p in (path, tmp_path / "out"))
    assert before[-500:] == after[-500:]
    assert "score.weight" in formats.load(tmp_path / "out").replacements


def test_rslora_modules_that_stay_keep_their_scale_beside_resized_ones(tmp_path: Path) -> None:
    source = formats.load(_source(tmp_path, config={"use_rslora": True}))

    resize(source, tmp_path / "out", rank=3)

    back = formats.load(tmp_path / "out")
    kept = "model.layers.1.self_attn.v_proj"
    assert back.updates[kept].scale == pytest.approx(5 / math.sqrt(2), rel=1e-15)
    assert back.updates["model.layers.0.self_attn.q_proj"].scale == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reported_error_is_that_of_the_stored_values(tmp_path: Path, dtype: str) -> None:
    source = formats.load(_source(tmp_path))

    report = resize(source, rank=3, dtype=dtype)

    for module in report.modules:
        wanted = _dense(source, module.name)
        distance = float((_dense(report.adapter, module.name) - wanted).norm() / wanted.norm())
        assert module.error == pytest.approx(distance, rel=1e-6, abs=1e-15)


def test_energy_one_drops_only_what_is_redundant() -> None:
    b, a = torch.randn(10, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    twice = LoRA(from_torch(torch.cat([a, a])), from_torch(torch.cat([b, b], dim=1)), 4.0, "config")

    report = resize(Adapter({"m": twice}), energy=1.0)

    assert [(m.rank_in, m.rank) for m in report.modules] == [(4, 2)]
    torch.testing.assert_close(_dense(report.adapter, "m"), 2 * b @ a, rtol=1e-13, atol=1e-13)


def test_untrained_module_becomes_rank_one_of_zeros() -> None:
    zero = LoRA(from_torch(torch.randn(4, 6)), from_torch(torch.zeros(10, 4)), 4.0, "config")

    report = resize(Adapter({"m": zero}), energy=0.5)

    assert [(m.rank, m.energy, m.error) for m in report.modules] == [(1, 1.0, 0.0)]


@pytest.mark.parametrize("alpha", [1e200, 1e300])
def test_an_absurd_alpha_is_refused_by_module(tmp_path: Path, alpha: float) -> None:
    folder = factories.adapter_folder(tmp_path / "a", alpha=alpha)

    with pytest.raises(InputError, match="no trained weight"):
        resize(folder, tmp_path / "out", rank=2)

    assert not (tmp_path / "out").exists()


def test_no_rule_and_two_rules_are_usage_errors(tmp_path: Path) -> None:
    path = _source(tmp_path)

    with pytest.raises(UsageError, match="no rule for the ranks"):
        resize(path)
    with pytest.raises(UsageError, match="exclude each other"):
        resize(path, rank=2, error=0.1)
    with pytest.raises(OutputExistsError):
        resize(path, path, rank=2, overwrite=True)


def test_plan_writes_nothing(tmp_path: Path) -> None:
    path = _source(tmp_path)

    planned, done = (resize(path, tmp_path / "out", rank=3, plan=p) for p in (True, False))

    assert [m.rank for m in planned.modules] == [m.rank for m in done.modules] == [3, 3, 3, 2]
    assert planned.bytes == done.bytes
    assert (planned.output, planned.adapter) == (None, None)


def test_command_prints_json_and_says_what_is_unchanged(tmp_path: Path) -> None:
    path = str(_source(tmp_path))
    runner = click.testing.CliRunner()

    told = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "out"), "--rank", "3"])
    document = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "out2"), "--energy", "0.9", "--json"])
    wrong = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "out3"), "--energy", "95"])

    assert told.exit_code == 0, told.stderr
    assert told.stdout == ""
    assert "1 module small enough already" in told.stderr
    body = json.loads(document.stdout)
    assert set(body["modules"][0]) == {"name", "rank_in", "rank", "energy", "error"}
    assert wrong.exit_code == 2
    assert "0.95" in wrong.stderr
    assert not (tmp_path / "out3").exists()


def _spectra(source: Adapter) -> dict[str, Tensor]:
    return {name: torch.linalg.svdvals(_dense(source, name)) for name in source.updates}


@pytest.mark.parametrize(("name", "value"), [("sv_ratio", 2.5), ("sv_cumulative", 0.7), ("sv_fro", 0.9)])
def test_kohyas_rules_are_their_definition(tmp_path: Path, name: str, value: float) -> None:
    source = formats.load(_source(tmp_path))

    report = resize(source, rule=(name, value))

    for module in report.modules:
        s = _spectra(source)[module.name][: source.updates[module.name].rank].tolist()
        if name == "sv_ratio":
            wanted = sum(x > s[0] / value for x in s)
        else:
            power = 1 if name == "sv_cumulative" else 2
            sums = [sum(x**power for x in s[: k + 1]) ** (1 / power) for k in range(len(s))]
            wanted = next(k + 1 for k, total in enumerate(sums) if total >= value * sums[-1])
        assert module.rank == wanted
    capped = resize(source, rule=(name, value), max_rank=1)
    assert {m.rank for m in capped.modules} == {1}


def test_rules_are_strict(tmp_path: Path) -> None:
    path = _source(tmp_path)

    for rule, message in [(("sv_frob", 0.9), "no rule"), (("sv_fro", 1.5), "share"), (("sv_ratio", 0.5), "1 or more")]:
        with pytest.raises(UsageError, match=message):
            resize(path, rule=rule)
    with pytest.raises(UsageError, match="exclude each other"):
        resize(path, rank=2, max_params=100)


def test_parameters_are_shared_out_so_that_the_loss_is_least(tmp_path: Path) -> None:
    import itertools

    source = formats.load(_source(tmp_path))
    budget = 130
    spectra = _spectra(source)
    costs = {name: sum(u.shape) for name, u in source.updates.items()}
    names = list(source.updates)

    report = resize(source, max_params=budget, dtype="float64")

    def lost(ranks: tuple[int, ...]) -> float:
        return sum(float(spectra[n][r:].square().sum()) for n, r in zip(names, ranks, strict=True))

    choices = itertools.product(*(range(1, source.updates[n].rank + 1) for n in names))
    fitting = [c for c in choices if sum(r * costs[n] for n, r in zip(names, c, strict=True)) <= budget]
    best = min(lost(c) for c in fitting)
    total = sum(float(s.square().sum()) for s in spectra.values())
    ranks = tuple(m.rank for m in report.modules)
    assert ranks in fitting
    # A knapsack filled greedily may miss the optimum by less than one unit.
    worst_unit = max(float(s[0]) ** 2 for s in spectra.values())
    assert best <= lost(ranks) < best + worst_unit
    assert report.error == pytest.approx(math.sqrt(lost(ranks) / total), rel=1e-9)
    assert report.adapter is not None
    assert sum(t.elements for t in report.adapter.tensors().values()) <= budget


@pytest.mark.parametrize("size", [2400, 2600, 3000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_is_no_larger_than_asked_for(tmp_path: Path, size: int, dtype: str) -> None:
    path = _source(tmp_path, extra={"score.weight": torch.randn(3, 5)}, config={"modules_to_save": ["score"]})

    report = resize(path, tmp_path / "out", max_size=size, dtype=dtype)

    assert (tmp_path / "out/adapter_model.safetensors").stat().st_size <= size
    assert report.modules


def test_command_takes_budgets_and_rules(tmp_path: Path) -> None:
    path = str(_source(tmp_path))
    runner = click.testing.CliRunner()

    fits = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "a"), "--max-params", "100", "--json"])
    rule = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "b"), "--rule", "sv_fro=0.9", "--plan"])
    small = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "c"), "--max-size", "1kB"])

    assert fits.exit_code == 0, fits.stderr
    assert sum(m["rank"] for m in json.loads(fits.stdout)["modules"]) >= 4
    assert rule.exit_code == 0, rule.stderr
    assert "model.layers.0.self_attn.q_proj" in rule.stdout
    assert (small.exit_code, "1,000 bytes are too few: rank 1 in each of" in small.stderr) == (2, True)
    assert [p.name for p in tmp_path.iterdir() if p.name in "abc"] == ["a"]


def test_command_writes_the_format_that_is_asked_for_and_a_plan_says_what_it_cannot_hold(tmp_path: Path) -> None:
    path = str(_source(tmp_path))
    runner = click.testing.CliRunner()

    mlx = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "mlx"), "--rank", "2", "--format", "mlx"])
    both = runner.invoke(verbs, ["combine", path, path, "-o", str(tmp_path / "both"), "--format", "mlx"])
    kohya = ["--rank", "2", "--format", "kohya", "--plan"]
    resized = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "k.safetensors"), *kohya])
    combined = runner.invoke(verbs, ["combine", path, path, "-o", str(tmp_path / "k.safetensors"), *kohya])
    named = runner.invoke(verbs, ["resize", path, "-o", str(tmp_path / "k"), *kohya])

    assert (mlx.exit_code, both.exit_code) == (0, 0), mlx.stderr + both.stderr
    assert [(tmp_path / n / "adapters.safetensors").is_file() for n in ("mlx", "both")] == [True, True]
    for refused in (resized, combined):
        assert refused.exit_code == 4
        assert "cannot be written as kohya" in refused.stderr
        assert "hint: choose a format of language models" in refused.stderr
    assert (named.exit_code, "k.safetensors" in named.stderr) == (2, True)
