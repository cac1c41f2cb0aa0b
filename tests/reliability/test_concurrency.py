"""Two runs for one output, and a reader that has the old one open: one winner, and nothing mixed."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import factories
import pytest
from reliability.killing import content

import loratools


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    factories.checkpoint_folder(tmp_path / "base", shards=2)
    factories.adapter_folder(tmp_path / "style")
    for name, weight in (("first", 1.0), ("second", 0.5)):
        loratools.merge(tmp_path / "base", [(tmp_path / "style", weight)], tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "replacing"])
def test_two_merges_to_one_output_have_one_winner(inputs: Path, overwrite: bool) -> None:
    if overwrite:
        loratools.merge(inputs / "base", [(inputs / "style", 0.1)], inputs / "out")
    command = [sys.executable, "-m", "loratools", "merge", "base", "-q", "-o", "out", *["--overwrite"] * overwrite]
    runs = [
        subprocess.Popen([*command, adapter], cwd=inputs, stderr=subprocess.PIPE, text=True)
        for adapter in ("style", "style=0.5", "style", "style=0.5")
    ]
    errors = [run.communicate()[1] for run in runs]

    codes = [run.returncode for run in runs]
    assert content(inputs / "out") in (content(inputs / "first"), content(inputs / "second"))
    if not overwrite:
        assert sorted(codes) == [0, 2, 2, 2], errors
    assert all(code in (0, 2, 5) for code in codes), errors
    assert 0 in codes
    loratools.clean(inputs)
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "first", "out", "second", "style"]


def test_a_reader_of_the_old_output_keeps_its_bytes(inputs: Path) -> None:
    loratools.merge(inputs / "base", [(inputs / "style", 0.5)], inputs / "out")
    name = "model-00001-of-00002.safetensors"
    old = (inputs / "out" / name).read_bytes()
    with (inputs / "out" / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        loratools.merge(inputs / "base", inputs / "style", inputs / "out", overwrite=True)

        assert mapped[:] == old
        assert file.read() == old
    assert content(inputs / "out") == content(inputs / "first")


def test_an_adapter_is_resized_onto_itself_by_no_one(inputs: Path) -> None:
    """An output that is an input is refused, though it is mapped by somebody or not."""
    before = content(inputs / "style")

    with pytest.raises(loratools.OutputExistsError):
        loratools.resize(inputs / "style", inputs / "style", rank=1, overwrite=True)

    assert content(inputs / "style") == before
