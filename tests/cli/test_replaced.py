"""Every verb that writes replaces what loratools wrote and nothing else, and says so beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
from click.testing import CliRunner

from loratools.cli import verbs

VERBS: dict[str, Callable[[Path], list[str]]] = {
    "merge": lambda at: ["merge", str(at / "base"), str(at / "adapter")],
    "extract": lambda at: ["extract", str(at / "base"), str(at / "tuned"), "--rank", "2"],
    "combine": lambda at: ["combine", str(at / "adapter")],
    "resize": lambda at: ["resize", str(at / "adapter"), "--rank", "1"],
    "convert": lambda at: ["convert", str(at / "adapter"), "--to", "mlx"],
}


def call(*args: str) -> tuple[int, dict]:
    done = CliRunner().invoke(verbs, [*args, "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    factories.checkpoint_folder(tmp_path / "base", config={"num_attention_heads": 2, "num_key_value_heads": 1})
    factories.adapter_folder(tmp_path / "adapter")
    assert call("merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "tuned"))[0] == 0
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_overwrite_replaces_only_what_loratools_wrote(inputs: Path, verb: str) -> None:
    args, out = VERBS[verb](inputs), inputs / "out"
    assert call(*args, "-o", str(out))[0] == 0
    written = sorted(path.name for path in out.iterdir())
    assert "loratools.json" in written
    (out / "checkpoint-500").mkdir()
    (out / "checkpoint-500" / "adapter_model.safetensors").write_bytes(b"precious")
    (out / "notes.txt").write_text("mine")

    code, planned = call(*args, "-o", str(out), "--plan", "--overwrite")

    assert code == 0
    assert (planned["replaces"], planned["keeps"]) == (written, ["checkpoint-500/", "notes.txt"])
    assert call(*args, "-o", str(out), "--overwrite")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*written, "checkpoint-500", "notes.txt"])
    assert (out / "checkpoint-500" / "adapter_model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("verb", VERBS)
def test_folder_of_a_person_is_refused_before_any_work(inputs: Path, verb: str) -> None:
    project = inputs / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src" / "main.py").write_text("print(1)")

    for plan in ([], ["--plan"]):
        code, document = call(*VERBS[verb](inputs), "-o", str(project), "--overwrite", *plan)
        assert code == 2
        assert "no record of what loratools wrote" in document["error"]["message"]
    assert sorted(path.name for path in project.iterdir()) == ["config.json", "src"]


def test_single_file_of_somebody_else_is_refused(inputs: Path) -> None:
    out = inputs / "out.gguf"
    # The rows of queries and keys are reordered by heads of an even width.
    modules = {"model.layers.0.self_attn.q_proj": (12, 6), "model.layers.0.self_attn.v_proj": (7, 6)}
    factories.adapter_folder(inputs / "adapter", modules=modules)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = factories.checkpoint_folder(inputs / "wide", weights=factories.base_weights(modules), config=heads)
    args = ["convert", str(inputs / "adapter"), "--to", "gguf", "--base", str(base), "-o", str(out)]
    out.write_bytes(b"precious")

    code, document = call(*args, "--overwrite")
    assert code == 2
    assert "not written by loratools" in document["error"]["message"]
    assert out.read_bytes() == b"precious"

    out.unlink()
    assert call(*args)[0] == 0
    code, planned = call(*args, "--overwrite", "--plan")
    assert (code, planned["replaces"]) == (0, ["out.gguf"])
    assert call(*args, "--overwrite")[0] == 0
