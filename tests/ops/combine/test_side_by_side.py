"""Several methods on the same adapters: each row is what the method alone reports, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
from cli_runner import CliRunner

import loratools
from loratools import registry
from loratools.cli import verbs
from loratools.errors import UsageError

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of ranks 3 and 2 on one module, of 9 rows and 7 columns."""
    for folder, rank, seed in (("one", 3, 1), ("two", 2, 2)):
        factories.adapter_folder(tmp_path / folder, modules={NAME: (9, 7)}, rank=rank, seed=seed)
    return tmp_path / "one", tmp_path / "two"


def product(folder: Path) -> Any:
    """`alpha / r * B @ A` of the folder, in float64."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a = next(t for name, t in tensors.items() if "lora_A" in name).astype(np.float64)
    b = next(t for name, t in tensors.items() if "lora_B" in name).astype(np.float64)
    return config["lora_alpha"] / config["r"] * b @ a


def test_gains_and_interferences_of_the_exact_sum_are_those_of_its_matrices(pair: tuple[Path, Path]) -> None:
    one, two = map(product, pair)

    report = loratools.compare_methods(pair, ["linear"])

    (linear,) = report.methods
    assert [share.gain for share in linear.adapters] == pytest.approx(
        [np.vdot(one + two, own) / np.vdot(own, own) for own in (one, two)], rel=1e-6
    )
    rows = np.linalg.svd(one)[2][:3]
    other = np.linalg.norm(two @ rows.T) / np.linalg.norm(one)
    assert linear.adapters[0].interference == pytest.approx(other, rel=1e-6)
    assert (linear.rank, linear.refused) == (5, None)


def test_every_row_says_what_the_method_alone_says(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = loratools.compare_methods(pair, rank=2)

    assert sorted(outcome.method for outcome in report.methods) == list(registry.names("methods"))
    for outcome in report.methods:
        if outcome.refused is None:
            alone = loratools.combine(pair, tmp_path / outcome.method, method=outcome.method, rank=2)
            assert (outcome.adapters, outcome.error) == (alone.adapters, alone.error)
        else:
            with pytest.raises(loratools.LoraToolsError) as caught:
                loratools.combine(pair, tmp_path / outcome.method, method=outcome.method, rank=2)
            assert caught.value.message == outcome.refused


def test_smallest_interference_comes_first_and_refused_methods_last(pair: tuple[Path, Path]) -> None:
    methods = loratools.compare_methods(pair, rank=2).methods

    ran = [outcome.interference for outcome in methods if outcome.refused is None]
    assert ran == sorted(ran, key=lambda value: value or 0.0)
    assert len(set(ran)) > 3
    refused = [outcome.refused is not None for outcome in methods]
    assert refused == sorted(refused)
    assert any(refused)  # peft-linear wants equal ranks


def test_an_option_reaches_the_methods_that_have_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = loratools.compare_methods(pair, ["ties", "linear"], rank=2, options={"density": 0.9})

    by_method = {outcome.method: outcome for outcome in report.methods}
    dense = loratools.combine(pair, tmp_path / "dense", method="ties", rank=2, options={"density": 0.9})
    usual = loratools.combine(pair, tmp_path / "usual", method="ties", rank=2)
    assert by_method["ties"].adapters == dense.adapters != usual.adapters


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        (["tiess"], {}, "no method named 'tiess'"),
        (["ties", "linear"], {"densty": 0.3}, "none of the methods has an option 'densty'"),
        (["ties", "linear"], {"density": 3}, "density cannot be 3"),
        ([], {}, "no method is named"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_read(
    methods: list[str], options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        loratools.compare_methods(["nowhere", "nowhere-else"], methods, options=options)


def test_where_no_method_can_the_reason_is_the_error(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="there is no file or folder"):
        loratools.compare_methods([pair[0], pair[1] / "missing"])


def test_an_argument_that_combine_does_not_have_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no parameter 'ranck'"):
        loratools.compare_methods(pair, ["linear", "ties"], ranck=2)


def test_command_prints_a_row_for_each_method_and_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    done = CliRunner().invoke(verbs, ["combine", *map(str, pair), "--method", "all", "--rank", "2", "--plan"])

    assert (done.exit_code, done.stderr) == (0, "")
    first_words = [line.split()[0].rstrip(":") for line in done.stdout.splitlines() if line.strip()]
    assert set(registry.names("methods")) <= set(first_words)
    assert sorted(tmp_path.rglob("*")) == before


def test_document_has_the_same_numbers(pair: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(
        verbs, ["combine", *map(str, pair), "--method", "ties,linear", "--rank", "2", "--plan", "--json"]
    )

    report = loratools.compare_methods(pair, ["ties", "linear"], rank=2)
    methods = json.loads(done.stdout)["methods"]
    assert [m["method"] for m in methods] == [outcome.method for outcome in report.methods]
    assert methods[0]["adapters"] == [share.to_dict() for share in report.methods[0].adapters]


def test_several_methods_without_plan_are_wrong_usage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(verbs, ["combine", *map(str, pair), "--method", "ties,linear", "-o", str(tmp_path / "x")])

    assert done.exit_code == 2
    assert "hint: add --plan" in done.stderr
    assert not (tmp_path / "x").exists()


def test_one_method_still_needs_an_output(pair: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(verbs, ["combine", *map(str, pair)])

    assert done.exit_code == 2
    assert "-o" in done.stderr
