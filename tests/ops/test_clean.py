"""What killed runs left is found and removed, whatever its name, machine or container; what is anybody's stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import loratools
from loratools.cli import verbs
from loratools.storage import system
from loratools.storage.commit import staged_folder
from loratools.storage.ownership import write_record
from loratools.storage.run_journal import JOURNAL
from loratools.storage.staging_names import process_space

PREPARES = """
import sys, time
from pathlib import Path
from loratools.storage import staging_names, system
from loratools.storage.commit import staged_folder
if sys.argv[2] == "elsewhere":
    # Another machine or container: its ids of processes mean nothing here.
    system.process_space = lambda: "another machine"
with staged_folder(Path(sys.argv[1]), overwrite=False, inputs=()) as staging:
    (staging / "model.safetensors").write_bytes(b"half of a file")
    print("begun", flush=True)
    time.sleep(60)
"""


@contextmanager
def run_in_the_middle(out: Path, where: str = "here") -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PREPARES, str(out), where]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def killed_run(out: Path, where: str = "here") -> Path:
    """The hidden folder of a run that was killed in the middle."""
    before = set(out.parent.iterdir())
    with run_in_the_middle(out, where):
        pass
    (folder,) = set(out.parent.iterdir()) - before
    return folder


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(sys.platform == "win32", reason="kills processes as POSIX does")
@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("renamed", [False, True], ids=["its own name", "another name"])
def test_killed_runs_are_listed_with_sizes_and_removed(tmp_path: Path, where: str, renamed: bool) -> None:
    (tmp_path / "models").mkdir()
    folder = killed_run(tmp_path / "models" / "out", where)
    if renamed:
        folder = folder.rename(folder.with_name(".renamed"))

    planned = loratools.clean(tmp_path, plan=True)

    assert [(run.path, run.output) for run in planned.removed] == [(folder, tmp_path / "models" / "out")]
    journal = (folder / JOURNAL).stat().st_size
    assert planned.bytes == planned.removed[0].bytes == len(b"half of a file") + journal
    assert folder.exists()

    done = CliRunner().invoke(verbs, ["clean", str(tmp_path), "--json"])

    document = json.loads(done.stdout)
    assert (done.exit_code, document["bytes"], document["planned"]) == (0, planned.bytes, False)
    assert [run["path"] for run in document["removed"]] == [str(folder)]
    assert list((tmp_path / "models").iterdir()) == []
    assert loratools.clean(tmp_path).removed == ()


@pytest.mark.skipif(sys.platform == "win32", reason="kills processes as POSIX does")
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_living_run_loses_nothing(tmp_path: Path, where: str) -> None:
    with run_in_the_middle(tmp_path / "out", where) as process:
        report = loratools.clean(tmp_path)

        assert process.poll() is None
        assert report.removed == ()
        assert [skipped.why for skipped in report.kept] == ["a run is writing it"]
        assert len(list(tmp_path.glob(".out.*/model.safetensors"))) == 1


def test_where_locks_mean_nothing_the_process_id_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on network file systems that grant every lock."""
    lock = system.lock_folder
    monkeypatch.setattr(system, "lock_folder", lambda path: os.open(path, os.O_RDONLY))
    with staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging:
        (staging / "model.safetensors").touch()

        assert loratools.clean(tmp_path).removed == ()
        assert staging.exists()
    killed = killed_run(tmp_path / "other")
    elsewhere = killed_run(tmp_path / "third", "elsewhere")

    report = loratools.clean(tmp_path)

    assert [run.path for run in report.removed] == [killed]
    assert [skipped.name for skipped in report.kept] == [str(elsewhere)]
    monkeypatch.setattr(system, "lock_folder", lock)
    assert [run.path for run in loratools.clean(tmp_path).removed] == [elsewhere]


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    space, dead = process_space(), dead_process()
    lookalikes = [
        tmp_path / f".out.loratools-{dead}-{space}00000000",  # our name, and nothing of ours in it
        tmp_path / ".out.loratools-backup",
        tmp_path / ".cache",
        tmp_path / "models" / "out",
    ]
    for path in lookalikes:
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"a person's")
    (lookalikes[2] / JOURNAL).write_text('{"loratools": "0.1.0"}\n')  # another program's file of that name
    write_record(lookalikes[3])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    killed = killed_run(elsewhere / "out")
    (tmp_path / "models" / "link").symlink_to(elsewhere)

    report = loratools.clean(tmp_path / "models")

    assert (report.removed, report.kept, report.failed) == ((), (), ())
    assert loratools.clean(tmp_path).removed[0].path == killed
    assert all((path / "model.safetensors").exists() for path in lookalikes)


def test_an_old_output_that_was_moved_aside_gets_its_name_back(tmp_path: Path) -> None:
    aside = tmp_path / f".out.loratools-old-{dead_process()}-{process_space()}00000000"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"old")
    write_record(aside)

    report = loratools.clean(tmp_path)

    assert [run.action for run in report.removed] == ["restored"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"old"


def test_a_persons_files_in_a_replaced_output_are_moved_to_the_new_one(tmp_path: Path) -> None:
    """Killed right after the exchange: the old output has the hidden name, and no journal."""
    out, old = tmp_path / "out", tmp_path / f".out.loratools-{dead_process()}-{process_space()}00000000"
    for folder, content in ((out, b"new"), (old, b"old")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        write_record(folder)
    (old / "notes.txt").write_text("written in the last moment")

    loratools.clean(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (out / "model.safetensors").read_bytes() == b"new"
    assert (out / "notes.txt").read_text() == "written in the last moment"


def test_a_run_killed_before_its_first_line_leaves_an_empty_folder(tmp_path: Path) -> None:
    space = process_space()
    dead = tmp_path / f".out.loratools-{dead_process()}-{space}00000000"
    young = tmp_path / ".out.loratools-1-0000000000000000"  # of another container, just made
    old = tmp_path / ".out.loratools-1-0000000000000001"
    for path in (dead, young, old):
        path.mkdir()
        (path / JOURNAL).touch()
    os.utime(old, (time.time() - 3600, time.time() - 3600))

    report = loratools.clean(tmp_path)

    assert sorted(run.path for run in report.removed) == sorted([dead, old])
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may remove everything")
def test_what_cannot_be_removed_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = killed_run(tmp_path / "out")
    tmp_path.chmod(0o555)
    try:
        done = CliRunner().invoke(verbs, ["clean", str(tmp_path)])
    finally:
        tmp_path.chmod(0o755)

    assert done.exit_code == 5
    assert folder.name in done.output


def test_a_folder_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    done = CliRunner().invoke(verbs, ["clean", str(tmp_path / "missing")])

    assert done.exit_code == 2
    assert CliRunner().invoke(verbs, ["clean", str(tmp_path)]).exit_code == 0
