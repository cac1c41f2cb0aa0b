"""The files of an output are held against its own record: bits that changed, copies cut off, missing, added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from cli_runner import CliRunner

import loratools
from loratools.cli import verbs
from loratools.errors import InputError, UsageError

WRITERS: dict[str, Callable[[Path], object]] = {
    "merge": lambda at: loratools.merge(at / "base", at / "style", at / "out"),
    "extract": lambda at: loratools.extract(at / "base", at / "tuned", at / "out", rank=2),
    "combine": lambda at: loratools.combine([at / "style", at / "style"], at / "out"),
    "resize": lambda at: loratools.resize(at / "style", at / "out", rank=2),
    "convert": lambda at: loratools.convert(at / "style", at / "out", format="mlx", base=at / "base"),
    "save": lambda at: loratools.save(at / "style", at / "out"),
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "style")
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "tuned")
    return tmp_path


@pytest.mark.parametrize("verb", WRITERS)
def test_the_output_of_every_verb_is_verified_by_its_record_alone(inputs: Path, verb: str) -> None:
    WRITERS[verb](inputs)
    moved = (inputs / "out").rename(inputs / "elsewhere")

    report = loratools.verify_files(moved)

    assert (report.verdict, report.exit_code, report.diagnosis) == ("same", 0, ())
    assert len(report.files) >= 2
    record = json.loads((moved / "loratools.json").read_text())["files"]
    for name, entry in record.items():
        if verb != "merge" or name == "config.json":
            assert entry["sha256"] == hashlib.sha256((moved / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize(
    ("damage", "code"),
    [("a bit", "file-changed"), ("cut off", "file-truncated"), ("zeros", "file-changed"), ("gone", "file-missing")],
)
def test_damage_is_told_by_name(inputs: Path, verb: str, damage: str, code: str) -> None:
    WRITERS[verb](inputs)
    (file,) = (inputs / "out").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "a bit":
        data[-3] ^= 1
    elif damage == "cut off":
        del data[-1]
    elif damage == "zeros":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    if damage == "gone":
        file.unlink()

    report = loratools.verify_files(inputs / "out")

    assert (report.verdict, report.exit_code) == ("different", 1)
    assert [(finding.code, finding.names) for finding in report.diagnosis] == [(code, (file.name,))]


def test_added_files_are_told(inputs: Path) -> None:
    WRITERS["merge"](inputs)
    (inputs / "out" / "model-00009-of-00009.safetensors").touch()
    (inputs / "out" / "notes").mkdir()
    (inputs / "out" / "notes" / "todo.txt").touch()

    (finding,) = loratools.verify_files(inputs / "out").diagnosis

    assert (finding.code, finding.names) == ("file-extra", ("model-00009-of-00009.safetensors", "notes/todo.txt"))


def test_of_large_weight_files_of_a_merge_only_pieces_are_recorded_unless_the_manifest_is_asked_for(
    tmp_path: Path,
) -> None:
    module = {"model.layers.0.self_attn.q_proj": (1500, 1000)}
    factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(module))
    factories.adapter_folder(tmp_path / "style", modules=module)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "sampled")
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "hashed", manifest=True)

    sampled, hashed = (loratools.verify_files(tmp_path / name) for name in ("sampled", "hashed"))

    assert (sampled.verdict, sampled.exit_code) == ("undecided", 3)
    assert [(f.code, f.names, f.undecided) for f in sampled.diagnosis] == [("sampled", ("model.safetensors",), True)]
    assert "--manifest" in sampled.diagnosis[0].message
    assert hashed.verdict == "same"
    for name in ("sampled", "hashed"):  # a bit between two of the pieces
        data = bytearray((tmp_path / name / "model.safetensors").read_bytes())
        position = len(data) // 64 * 7 + (1 << 16) + 10
        data[position] ^= 1
        (tmp_path / name / "model.safetensors").write_bytes(data)
    assert loratools.verify_files(tmp_path / "sampled").verdict == "undecided"
    assert loratools.verify_files(tmp_path / "hashed").verdict == "different"


def test_what_has_no_record_is_refused(inputs: Path) -> None:
    with pytest.raises(InputError, match="no record"):
        loratools.verify_files(inputs / "base")
    with pytest.raises(UsageError, match="is one file"):
        loratools.verify_files(inputs / "base" / "model.safetensors")
    with pytest.raises(UsageError, match="does not exist"):
        loratools.verify_files(inputs / "nothing")
    WRITERS["resize"](inputs)
    (inputs / "out" / "loratools.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        loratools.verify_files(inputs / "out")


def test_the_command_needs_neither_base_nor_adapters(inputs: Path) -> None:
    WRITERS["merge"](inputs)

    text = CliRunner().invoke(verbs, ["verify", str(inputs / "out"), "--files", "-v"])
    document = CliRunner().invoke(verbs, ["verify", str(inputs / "out"), "--files", "--json"])
    (inputs / "out" / "config.json").write_text("{}")
    different = CliRunner().invoke(verbs, ["verify", str(inputs / "out"), "--files"])
    both = CliRunner().invoke(verbs, ["verify", str(inputs / "out"), "--files", "--base", str(inputs / "base")])
    neither = CliRunner().invoke(verbs, ["verify", str(inputs / "out")])

    assert (text.exit_code, document.exit_code, different.exit_code) == (0, 0, 1)
    assert text.stdout.startswith("verdict  same")
    assert json.loads(document.stdout)["verdict"] == "same"
    assert "config.json" in different.stdout
    assert (both.exit_code, neither.exit_code) == (2, 2)
    assert "--files" in neither.stderr


def test_the_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    factories.checkpoint_folder(tmp_path / "base", weights={"a.weight": torch.ones(5, 3)}, shards=1)
    factories.adapter_folder(tmp_path / "style", modules={"a": (5, 3)})
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "out", manifest=True)

    record = json.loads((tmp_path / "out" / "loratools.json").read_text())["files"]

    assert {name: entry["sha256"] for name, entry in record.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "out").iterdir()
        if path.name != "loratools.json"
    }
