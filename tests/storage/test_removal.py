"""What is left of an output that was replaced, when the run that removes it is killed: known as ours, and removed."""

from __future__ import annotations

import sys
from pathlib import Path

import factories
import pytest
from reliability.killing import content, killed_at

import loratools
from loratools.storage.ownership import RECORD, owned_files
from loratools.storage.removal import remove_replaced
from loratools.storage.staging_names import name_prefix, process_space

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes and kills them")


def replaced_output(at: Path) -> Path:
    """An output under its own name, and what it replaced under the name of a hidden folder of a dead run."""
    factories.adapter_folder(at / "style")
    loratools.resize(at / "style", at / "old", rank=2)
    loratools.resize(at / "style", at / "out", rank=1)
    # No process has so high a number.
    return (at / "old").rename(at / f"{name_prefix(at / 'out')}{1 << 30}-{process_space()}01234567")


def test_what_is_left_of_a_replaced_output_is_cleaned_wherever_the_run_was_killed(tmp_path: Path) -> None:
    removed = 0
    for n in range(1, 200):
        place = tmp_path / str(n)
        old = replaced_output(place)
        new = content(place / "out")
        owned = owned_files(old)
        assert owned is not None
        killed = killed_at(n, lambda old=old, owned=owned: remove_replaced(old, old.parent / "out", owned))  # type: ignore[misc]
        names = {path.name for path in old.iterdir()} if old.exists() else set()
        assert not names or RECORD in names, n

        loratools.clean(place)

        assert sorted(path.name for path in place.iterdir()) == ["out", "style"], n
        assert content(place / "out") == new
        removed += bool(names)
        if not killed:
            break
    else:
        pytest.fail("no run came to its end")
    assert removed > 3


def test_the_next_run_takes_what_is_left_of_a_replaced_output_for_no_input(tmp_path: Path) -> None:
    """It reads the record that lies there, and removes the files while it holds its inputs."""
    old = replaced_output(tmp_path)

    loratools.resize(tmp_path / "style", tmp_path / "out", rank=3, overwrite=True)

    assert not old.exists()
    assert loratools.verify_files(tmp_path / "out").verdict == "same"
