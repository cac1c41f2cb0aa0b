"""The verb inspect, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
from cli_runner import CliRunner

import loratools
from loratools import registry
from loratools.cli import verbs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    factories.adapter_folder(Path("style"))
    factories.checkpoint_folder(Path("base"))
    Path("page.safetensors").write_text("<!DOCTYPE html><html></html>")


def test_document_is_that_of_the_python_twin() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "style", "base", "--values", "--json"])

    assert (done.exit_code, done.stderr) == (0, "")
    head = {"loratools": loratools.__version__, "schema_version": 1, "verb": "inspect"}
    assert json.loads(done.stdout) == {**head, **loratools.inspect("style", "base", values=True).to_dict()}


def test_table_goes_to_stdout() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "style"])

    assert (done.exit_code, done.stderr) == (0, "")
    assert "model.layers.{0,1}.self_attn.q_proj" in done.stdout


def test_modules_gives_each_a_row() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "style", "--modules"])

    assert done.exit_code == 0
    for name in factories.MODULES:
        assert done.stdout.count(f"{name} ") == 1


def test_one_bad_source_is_the_error() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "page.safetensors", "--json"])

    assert done.exit_code == 4
    assert set(json.loads(done.stdout)) == {"loratools", "schema_version", "verb", "error"}
    assert done.stderr.startswith("error: 'page.safetensors' ")


def test_bad_source_among_several_leaves_the_others_and_ends_with_4() -> None:
    plain = CliRunner().invoke(verbs, ["inspect", "style", "page.safetensors", "base"])
    document = CliRunner().invoke(verbs, ["inspect", "style", "page.safetensors", "base", "--json"])

    assert (plain.exit_code, document.exit_code) == (4, 4)
    assert [line.split()[:4] for line in plain.stdout.splitlines()[2:5]] == [
        ["style", "tiny/base", "lora", "4"],
        ["page.safetensors", "–", "cannot", "be"],
        ["base", "–", "huggingface", "checkpoint"],
    ]
    # The reason stands once, with the table; the end says how many there were.
    assert (plain.stdout + plain.stderr).count("not a safetensors file but a web page") == 1
    assert plain.stderr == "error: 1 of 3 sources could not be inspected\n"
    assert document.stderr.startswith("error: 1 of 3 sources could not be inspected\n  page.safetensors: ")
    told = json.loads(document.stdout)
    assert [source["path"] for source in told["sources"]] == ["style", "page.safetensors", "base"]
    assert ["error" in source for source in told["sources"]] == [False, True, False]
    assert told["error"]["code"] == "input"


def test_folder_of_several_is_listed() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "."])

    assert (done.exit_code, done.stderr) == (4, "error: 1 of 3 sources could not be inspected\n")
    assert [line.split()[:4] for line in done.stdout.splitlines()[2:5]] == [
        ["base", "–", "huggingface", "checkpoint"],
        ["page.safetensors", "–", "cannot", "be"],
        ["style", "tiny/base", "lora", "4"],
    ]


def test_several_files_make_a_table_as_a_folder_does() -> None:
    files = ["style/adapter_model.safetensors", "base/model.safetensors"]
    done = CliRunner().invoke(verbs, ["inspect", *files])

    assert (done.exit_code, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == files
    in_full = CliRunner().invoke(verbs, ["inspect", *files, "--modules"])
    assert in_full.stdout.count("╭") == 2


def test_names_are_chosen_by_globs() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "style", "--include", "*q_proj", "--exclude", "*.1.*", "--json"])

    assert (done.exit_code, done.stderr) == (0, "")
    (source,) = json.loads(done.stdout)["sources"]
    assert [module["name"] for module in source["modules"]] == ["model.layers.0.self_attn.q_proj"]


def test_format_that_does_not_exist_is_wrong_usage() -> None:
    done = CliRunner().invoke(verbs, ["inspect", "style", "--from", "peff"])

    assert (done.exit_code, done.stdout) == (2, "")
    there = ", ".join(registry.names("formats"))
    assert done.stderr == f"error: no format named 'peff'; there are: {there}\nhint: did you mean 'peft'?\n"


def test_list_with_values_marks_sources_that_are_not_finite_or_untrained() -> None:
    import torch

    nan, untrained = (factories.factors({"model.layers.0.self_attn.q_proj": (10, 6)}) for _ in range(2))
    nan["model.layers.0.self_attn.q_proj"][0][1, 2] = float("nan")
    untrained["model.layers.0.self_attn.q_proj"][1].copy_(torch.zeros(10, 4))
    factories.adapter_folder(Path("list/nan"), values=nan)
    factories.adapter_folder(Path("list/untrained"), values=untrained)

    done = CliRunner().invoke(verbs, ["inspect", "list", "--values"])

    assert (done.exit_code, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith("warning: ")] == [
        f"warning: {Path('list/nan')}: values not finite in model.layers.0.self_attn.q_proj",
        f"warning: {Path('list/untrained')}: 1 module untrained, changing nothing: all of them",
    ]
