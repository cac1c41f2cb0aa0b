"""A merge that is ended from outside: its exit code, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import factories
import pytest
import torch
from reliability.killing import content

from loratools.storage.run_journal import JOURNAL

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

# Each block of rows takes a while, so that there is a middle to end it in.
SLOW = """
import sys, time
import loratools.ops.merge.rows as rows
write = rows.write_at
def slowly(*args, **options):
    time.sleep(0.05)
    write(*args, **options)
rows.write_at = slowly
from loratools.cli import main
main()
"""


def begun(tmp_path: Path, *, units: int = 0) -> subprocess.Popen[str]:
    """A merge that has begun to write; of which so many units are done."""
    # A unit takes most of a second.
    shape = {f"model.layers.{i}.mlp.up_proj": (1200, 500) for i in range(12)}
    if not (tmp_path / "base").exists():
        factories.checkpoint_folder(
            tmp_path / "base", weights=factories.base_weights(shape, dtype=torch.bfloat16), shards=2
        )
        factories.adapter_folder(tmp_path / "a", modules=shape)
    command = [sys.executable, "-c", SLOW, "merge", "base", "a", "-o", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while (not list(tmp_path.glob(".out.*/*.safetensors")) or noted(tmp_path) < units) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2 if not units else 0)
    return process


def noted(tmp_path: Path) -> int:
    """How many units are in the journal of the run."""
    return sum(file.read_text().count('"unit"') for file in tmp_path.glob(f".out.*/{JOURNAL}"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_merge_ended_by_a_signal_with_work_done_says_how_to_go_on(tmp_path: Path, name: str, code: int) -> None:
    process = begun(tmp_path, units=1)

    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert "--resume goes on" in err
    assert f"loratools clean {tmp_path}" in err
    assert len(list(tmp_path.glob(".out.*"))) == 1
    command = [sys.executable, "-m", "loratools", "merge", "base", "a", "-o"]
    again = subprocess.run([*command, "out", "--resume"], cwd=tmp_path, capture_output=True, text=True)
    subprocess.run([*command, "whole", "-q"], cwd=tmp_path, check=True)
    assert again.returncode == 0, again.stderr
    assert "a killed run was resumed" in again.stderr
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "out", "whole"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_merge_ended_by_a_signal_before_anything_is_done_leaves_nothing(tmp_path: Path, name: str, code: int) -> None:
    process = begun(tmp_path)

    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)

    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_change_nothing_about_a_merge(tmp_path: Path, closed: str) -> None:
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "a")
    command = f"{sys.executable} -m loratools merge base a -o out --json {closed}"

    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_folder_whose_name_is_not_unicode_is_merged(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/b\xff"
    factories.checkpoint_folder(Path(os.fsdecode(odd)))
    factories.adapter_folder(tmp_path / "a")
    command = [sys.executable, "-m", "loratools", "merge", os.fsdecode(odd), "a", "-o", "out"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True)

    assert done.returncode == 0, done.stderr


def test_a_killed_merge_leaves_nothing_under_the_outputs_name_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    process = begun(tmp_path)

    process.kill()
    process.communicate(timeout=30)

    assert not (tmp_path / "out").exists()
    time.sleep(0.5)  # its workers see that it is gone
    again = subprocess.run(
        [sys.executable, "-m", "loratools", "merge", "base", "a", "-o", "out"], cwd=tmp_path, capture_output=True
    )
    assert again.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "out"]


def test_ctrl_c_while_the_program_starts_shows_no_traceback() -> None:
    """At any time of the first tenths of a second; before our first line it is Python that answers."""
    program = "from loratools.__main__ import main; print(flush=True); main()"
    for i in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", program, "x"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.002 + 0.01 * i)

        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)

        # The verb 'x' does not exist: a machine that is fast enough says so before it is interrupted.
        assert process.returncode in (130, 2, -signal.SIGINT)
        # Before our first line it is Python that answers, of this one line of the test.
        assert "Traceback" not in err or err.count('File "') == err.count('File "<string>"')


def test_a_second_signal_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    process = begun(tmp_path)

    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)

    assert process.returncode in (130, 143)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_stderr_does_not_stop_the_work(tmp_path: Path) -> None:
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "a")
    command = f"{sys.executable} -m loratools merge base a -o out 2>/dev/full"

    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 2, "the output exists"
