"""Recipes and weights by module: read strictly, followed, and told again by what they made."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import factories
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loratools import formats
from loratools.adapter import Adapter, Replacement
from loratools.cli import verbs
from loratools.errors import FormatError, MismatchError, UsageError
from loratools.ops.combine.recipe import read_recipe
from loratools.ops.combine.verb import combine
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

RECIPE = """
method: ties
set: {density: 0.4, space: core}
rank: 3
seed: 5
heads: average
adapters:
  - adapter: one
    weight: 0.7
    modules: {"*.q_proj": 0.5, "*.1.*": 2}
  - two
"""


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _dense(adapter: Adapter | None, name: str) -> Tensor:
    assert adapter is not None
    factors = adapter.updates[name].factors()
    assert factors is not None
    return factors.b @ factors.a


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return factories.adapter_folder(tmp_path / "one", seed=1), factories.adapter_folder(tmp_path / "two", seed=2)


def test_recipe_does_what_the_same_arguments_do(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    recipe = _write(tmp_path / "r.yaml", RECIPE)

    by_recipe = combine(out=tmp_path / "a", recipe=recipe)
    combine(
        [(sources[0], 0.7), sources[1]],
        tmp_path / "b",
        method="ties",
        options={"density": 0.4, "space": "core"},
        rank=3,
        seed=5,
        heads="average",
        module_weights={"*.q_proj": [0.5, 1], "*.1.*": [2, 1]},
    )

    one, two = (formats.load(tmp_path / n) for n in "ab")
    assert {n: t.read().tolist() for n, t in one.tensors().items()} == {
        n: t.read().tolist() for n, t in two.tensors().items()
    }
    with safe_open(tmp_path / "a/adapter_model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["loratools"])
    assert told["verb"] == "combine"
    assert told["recipe"] == by_recipe.recipe
    assert told["recipe"]["adapters"] == [
        {"adapter": "one", "weight": 0.7, "modules": {"*.q_proj": 0.5, "*.1.*": 2.0}}, {"adapter": "two", "weight": 1.0}
    ]  # fmt: skip


def test_last_glob_counts_and_multiplies_the_adapters_weight(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    report = combine(
        [(sources[0], 0.5), sources[1]], module_weights={"*.q_proj": [4, 1], "*.1.self_attn.q_proj": 3}, dtype="float64"
    )

    one, two = map(formats.load, sources)
    for name, (first, second) in {
        "model.layers.0.self_attn.q_proj": (2.0, 1.0),
        "model.layers.1.self_attn.q_proj": (1.5, 3.0),
        "model.layers.1.self_attn.v_proj": (0.5, 1.0),
    }.items():
        wanted = first * _dense(one, name) + second * _dense(two, name)
        torch.testing.assert_close(_dense(report.adapter, name), wanted, rtol=1e-12, atol=1e-12)


def test_weight_zero_for_a_module_is_absence(sources: tuple[Path, Path]) -> None:
    some = combine(list(sources), module_weights={"*.q_proj": [0, 1], "*.0.self_attn.v_proj": 0})

    assert some.adapter is not None
    two = formats.load(sources[1])
    assert "model.layers.0.self_attn.v_proj" not in some.adapter.updates
    assert any("left out" in w and "layers.0.self_attn.v_proj" in w for w in some.warnings)
    name = "model.layers.0.self_attn.q_proj"
    assert some.adapter.updates[name].parts["B"].read().equal(two.updates[name].parts["B"].read())


def test_what_is_given_goes_before_the_recipe(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    recipe = _write(tmp_path / "r.yaml", RECIPE)

    report = combine(recipe=recipe, energy=0.9, options={"density": 0.6})

    assert report.recipe["set"] == {"density": 0.6, "space": "core"}
    assert report.recipe["energy"] == 0.9
    assert "rank" not in report.recipe
    assert "set" not in combine(recipe=recipe, method="linear").recipe
    with pytest.raises(UsageError, match="names some as well"):
        combine([sources[0]], recipe=recipe)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("methd: ties\nadapters: [one]", "methd is no field; did you mean method?"),
        ("adapters: [{adapter: one, wieght: 2}]", r"adapters\[0\].wieght is no field; did you mean weight?"),
        ("adapters: [{weight: 2}]", r"adapters\[0\] has no adapter"),
        ("adapters: [{adapter: one, modules: {a: much}}]", r"adapters\[0\].modules: 'a' is no number"),
        ("adapters: [3]", r"adapters\[0\] is no path"),
        ("rank: many", "rank is 'many', and no whole number"),
        ("rank: true", "rank is True"),
        ("norm_match: 1", "norm_match is 1, and no true or false"),
        ("method: ties\nmethod: linear", "'method' twice"),
        ("adapters: [", "is no YAML"),
        ("just words", "a recipe is a mapping"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_a_recipe_is_read_strictly(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(FormatError) as raised:
        read_recipe(_write(tmp_path / "r.yaml", text))
    raised.match(fault.replace("?", r"\?"))


def test_wrong_weights_are_usage_errors(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    for arguments, message in [
        ({"module_weights": {"*.k_proj": 0.5}}, "matches none of the 4 modules"),
        ({"module_weights": {"*.q_proj": [1, 2, 3]}}, "3 weights for 2 adapters"),
        ({"module_weights": {"*.q_proj": float("nan")}}, "not finite"),
        ({"block_weights": [[1.0] * 12]}, "in no block"),
        ({"block_weights": [[1.0] * 5]}, "5 block weights"),
        ({"heads": "frist"}, "one of refuse, first, average"),
        ({"calibrate": "svd"}, "calibrate is 'svd'"),
        ({"options": {"density": 0.5}}, "no option 'density'"),
    ]:
        with pytest.raises(UsageError, match=message):
            combine(list(sources), **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no recipe"):
        combine(recipe=tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="no negative weights"):
        combine([sources[0], (sources[1], -1.0)], method="slerp")


def test_block_weights_weigh_the_blocks_of_a_u_net() -> None:
    names = ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_in")
    update = LoRA(from_torch(torch.randn(2, 5)), from_torch(torch.randn(7, 2)), 2.0, "config")
    adapter = Adapter(dict.fromkeys(names, update))
    weights = [1.0] * 17
    weights[3], weights[7] = 0.25, 3.0  # IN04 and MID

    report = combine([adapter], block_weights=[weights], dtype="float64")

    for name, weight in zip(names, (0.25, 3.0), strict=True):
        torch.testing.assert_close(_dense(report.adapter, name), weight * _dense(adapter, name), rtol=1e-12, atol=1e-12)


def _with_head(head: Tensor, rows: tuple[int, ...] | None = None) -> Adapter:
    update = LoRA(from_torch(torch.randn(2, 5)), from_torch(torch.randn(7, 2)), 2.0, "config")
    return Adapter({"m": update}, {"score.weight": Replacement(from_torch(head), "modules_to_save", rows)})


def test_heads_that_differ_are_taken_by_policy_and_named() -> None:
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    pair = [(_with_head(one), 0.5), (_with_head(two), 1.5)]

    first, average = (combine(pair, heads=policy) for policy in ("first", "average"))

    assert first.adapter is not None
    assert average.adapter is not None
    assert first.adapter.replacements["score.weight"].tensor.read().equal(one)
    wanted = (0.25 * one.double() + 0.75 * two.double()).float()
    torch.testing.assert_close(average.adapter.replacements["score.weight"].tensor.read(), wanted, rtol=1e-6, atol=1e-7)
    assert any("score.weight" in w and "averaged" in w for w in average.warnings)
    assert any("score.weight" in w and "those of" in w for w in first.warnings)
    with pytest.raises(MismatchError, match="--heads first"):
        combine(pair)
    with pytest.raises(MismatchError, match="different shapes"):
        combine([_with_head(one), _with_head(two[:2])], heads="average")
    with pytest.raises(MismatchError, match="different values"):
        combine([_with_head(one, (1, 2, 3)), _with_head(two, (1, 2, 4))])


def test_command_takes_all_of_it(tmp_path: Path, sources: tuple[Path, Path]) -> None:
    recipe = _write(tmp_path / "r.yaml", RECIPE)
    one, two = map(str, sources)
    runner = click.testing.CliRunner()

    told = runner.invoke(
        verbs,
        ["combine", one, f"{two}=2", "-o", str(tmp_path / "x"), "--method", "ties", "--set", "density=0.5", "--set",
         "space=core", "--rank", "2", "--module-weight", "*.q_proj=0.5,1", "--calibrate", "svc", "--norm-match",
         "--residual", str(tmp_path / "rest"), "-v"],
    )  # fmt: skip
    planned = runner.invoke(verbs, ["combine", "--recipe", str(recipe), "-o", str(tmp_path / "y"), "--plan", "--json"])
    wrong = runner.invoke(verbs, ["combine", one, "-o", str(tmp_path / "z"), "--set", "density"])

    assert told.exit_code == 0, told.stderr
    assert "method ties" in told.stderr
    assert "model.layers.1.self_attn.v_proj" in told.stderr
    assert formats.load(tmp_path / "rest").updates
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["recipe"]["method"] == "ties"
    assert not (tmp_path / "y").exists()
    assert (wrong.exit_code, "option=value" in wrong.stderr) == (2, True)
