"""`loratools verify` as scripts meet it: exit codes, and one JSON document."""

import json
import re
from pathlib import Path

import factories
import pytest
from cli_runner import CliRunner

import loratools
from loratools.cli import verbs


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "style")
    loratools.merge("base", "style", "merged")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "verdict"),
    [
        (["merged", "--base", "base", "style"], 0, "same"),
        (["merged", "--base", "base", "style=0.5"], 1, "different"),
        (["base", "--base", "base", "style"], 1, "different"),
        (["merged", "--base", "base", "style", "--sample", "0.5"], 3, "undecided"),
    ],
)
def test_exit_code_is_the_verdict(merged: Path, arguments: list[str], code: int, verdict: str) -> None:
    text = CliRunner().invoke(verbs, ["verify", *arguments])
    document = CliRunner().invoke(verbs, ["verify", *arguments, "--json"])

    assert (text.exit_code, document.exit_code) == (code, code)
    assert re.match(rf"verdict +{verdict}\b", text.stdout)
    told = json.loads(document.stdout)
    assert (told["verb"], told["verdict"]) == ("verify", verdict)
    assert {"diagnosis", "recipe", "tensors", "untouched", "unexplained"} <= told.keys()
    assert {"name", "max_error_ratio", "weight", "ok"} <= told["tensors"][0].keys()


def test_source_that_does_not_exist_is_wrong_usage_and_an_adapter_of_another_model_bad_input(merged: Path) -> None:
    factories.adapter_folder(merged / "other", modules={"transformer.h.0.attn.c_attn": (9, 5)})

    missing = CliRunner().invoke(verbs, ["verify", "nothing", "--base", "base", "style"])
    misfit = CliRunner().invoke(verbs, ["verify", "merged", "--base", "base", "other"])
    without_base = CliRunner().invoke(verbs, ["verify", "merged", "style"])

    assert (missing.exit_code, misfit.exit_code, without_base.exit_code) == (2, 4, 2)
    assert "--base" in without_base.stderr
