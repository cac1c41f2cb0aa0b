# ruff: noqa: PT017 (whether a call fails is not known beforehand)
"""Every call to the system is made to fail once; processes are killed at any time. Old or new, never in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reliability.faulty import FaultyOs

from loratools.errors import LoraToolsError, MachineError
from loratools.storage import files, system
from loratools.storage.commit import staged_folder
from loratools.storage.gguf_writer import write_gguf
from loratools.storage.json_file import write_json
from loratools.storage.ownership import MARK, RECORD, write_record
from loratools.storage.safetensors_reader import read_header
from loratools.storage.safetensors_writer import SafetensorsWriter, TensorSpec, write_safetensors
from loratools.tensors.lazy import from_array

ROOT = Path(__file__).parents[2]


def write_one_file(base: Path, out: Path) -> None:
    tensors = read_header(base).tensors
    write_safetensors(out, {"copied": tensors["a"], "made": torch.ones(3)}, {"k": "v"})


def write_folder(base: Path, out: Path) -> None:
    with staged_folder(out, overwrite=True, inputs=[base]) as staging:
        write_one_file(base, staging / "model.safetensors")
        write_json(staging / "config.json", {"new": True})


def snapshot(path: Path) -> object:
    if path.is_dir():
        return {child.name: snapshot(child) for child in sorted(path.iterdir())}
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize(("old", "code"), [("old output", errno.EIO), ("no old output", errno.ENOSPC)])
@pytest.mark.parametrize("with_exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("job", [write_one_file, write_folder])
def test_failure_of_any_call_leaves_old_or_new(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: Callable[[Path, Path], None],
    with_exchange: bool,
    old: str,
    code: int,
) -> None:
    base = tmp_path / "base.safetensors"
    write_safetensors(base, {"a": torch.arange(10.0)}, {})
    if not with_exchange:
        monkeypatch.setattr(system, "exchange", lambda *_: False)
    reference = tmp_path / "reference"
    job(base, reference)
    new, before = snapshot(reference), None
    base_bytes = base.read_bytes()

    failures = 0
    for n in range(1, 1000):
        place = tmp_path / str(n)
        place.mkdir()
        out = place / "out"
        if old == "old output" and job is write_folder:
            out.mkdir()
            (out / "model.safetensors").write_bytes(b"old")
            (out / "notes.txt").write_text("a person's")
            write_record(out)
            (out / "notes.txt").write_text("changed by a person")
        elif old == "old output":
            out.write_bytes(b"old")
        before = snapshot(out)
        kept = {"notes.txt": b"changed by a person"} if out.is_dir() else {}
        files.close_inputs()
        faulty = FaultyOs(n, code)
        monkeypatch.setattr(system, "os", faulty)
        try:
            job(base, out)
            raised = False
        except LoraToolsError as error:
            raised = True
            assert error.exit_code == 5, (n, faulty.failed, error)
        finally:
            monkeypatch.setattr(system, "os", os)
        after = snapshot(out)
        expected = {**new, **kept} if isinstance(new, dict) else new
        assert after in (before, expected), (n, faulty.failed)
        assert raised or after == expected, (n, faulty.failed)
        assert [path.name for path in place.iterdir() if path != out] == [], (n, faulty.failed)
        assert base.read_bytes() == base_bytes
        failures += raised
        if not faulty.failed:
            break
    else:
        pytest.fail("no clean run was reached")
    assert failures > 15


def test_the_sweep_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A naive writer, seen by the same seam, leaves half a file."""
    out = tmp_path / "out"
    monkeypatch.setattr(system, "os", FaultyOs(3, errno.ENOSPC))

    fd = system.create(out)
    system.write_from(fd, memoryview(b"first"), 0)
    with pytest.raises(OSError, match="space"):
        system.write_from(fd, memoryview(b"second"), 5)

    assert out.read_bytes() == b"first"


def test_errors_name_the_output_and_not_what_it_is_prepared_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    write_safetensors(base, {"a": torch.arange(10.0)}, {})

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system, "allocate", full)
    with pytest.raises(LoraToolsError) as of_folder:
        write_folder(base, out)
    with pytest.raises(LoraToolsError) as of_file:
        write_one_file(base, out)

    assert of_folder.value.message == f"could not write '{out / 'model.safetensors'}': no space left on the disk"
    assert of_file.value.message == f"could not write '{out}': no space left on the disk"
    for error in (of_folder.value, of_file.value):
        (needed,) = error.details
        assert needed.endswith(" bytes are needed")
        assert "loratools-" not in str(error)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_small_file_without_room_is_an_error_of_the_machine(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(MachineError, match=f"could not write '{tmp_path / 'out'}': "),
        staged_folder(tmp_path / "out", overwrite=False, inputs=[]),
    ):
        # As Python itself raises it when a small text is written: without the name of the file.
        raise OSError(code, "no room")

    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="what is it") as caught,
        staged_folder(tmp_path / "out", overwrite=False, inputs=[]),
    ):
        raise OSError(errno.ENOTTY, "what is it")

    assert not isinstance(caught.value, LoraToolsError)


def test_gguf_file_without_room_says_how_much_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []

    def full(fd: int, size: int) -> None:
        wanted.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = {"a": from_array(np.ones((3, 5), np.float32)), "b": from_array(np.ones(7, np.float32))}
    write_gguf(tmp_path / "there.gguf", {"general.type": "adapter"}, tensors)
    monkeypatch.setattr(system, "allocate", full)
    with pytest.raises(MachineError) as caught:
        write_gguf(tmp_path / "x.gguf", {"general.type": "adapter"}, tensors)

    assert wanted == [(tmp_path / "there.gguf").stat().st_size]
    assert caught.value.details == (f"{wanted[0]:,} bytes are needed",)


KILLED = """
import sys
from pathlib import Path
from loratools.storage.files import identify
from loratools.storage.commit import staged_folder
from loratools.storage.safetensors_writer import SafetensorsWriter, TensorSpec
from loratools.tensors.files import ByteRange
base = identify(Path(sys.argv[1]))
with staged_folder(Path(sys.argv[2]), overwrite=True, inputs=[base.path]) as staging:
    for i in range(20):
        print(i, flush=True)
        sys.stdin.readline()
        with SafetensorsWriter(staging / f"{i}.safetensors", [TensorSpec("a", "U8", (base.size,))], {}) as writer:
            writer.copy("a", ByteRange(base, 0, base.size))
"""


# After so many files, where it waits and cannot have been done; or when a share of the time of a whole run has gone by.
@pytest.mark.parametrize("after", [0, 1, 7, 19, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_killed_process_leaves_nothing_under_the_final_name(tmp_path: Path, after: float, replacing: bool) -> None:
    (tmp_path / "base").write_bytes(b"\7" * 300_000)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "base"), str(out)]

    def run_whole() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, input=b"\n" * 20, capture_output=True)
        return time.perf_counter() - start

    whole = run_whole()
    good = snapshot(out)
    assert len(good) == 20 + len([RECORD])  # type: ignore[arg-type]
    if not replacing:
        subprocess.run(["rm", "-r", str(out)], check=True)

    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    waits = isinstance(after, int)
    if not waits:
        process.stdin.write(b"\n" * 20)
        process.stdin.flush()
        time.sleep(after * whole)
    else:
        for _ in range(int(after)):
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
    process.kill()
    process.communicate()

    assert snapshot(out) in ((good,) if replacing else (None,) if waits else (good, None))
    if waits:
        assert len(list(tmp_path.glob(".out.loratools-*"))) == 1
    with staged_folder(out, overwrite=True, inputs=()) as staging:
        (staging / "config.json").touch()
        (staging / "from.safetensors").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    subprocess.run(["rm", "-r", str(out)], check=True)
    run_whole()
    assert snapshot(out) == good


FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from loratools.errors import MachineError
from loratools.storage.commit import staged_file
from loratools.storage.files import identify
from loratools.storage.safetensors_writer import SafetensorsWriter, TensorSpec
from loratools.storage import system
from loratools.tensors.files import ByteRange
base = identify(Path(sys.argv[1]))
if sys.argv[3] == "late":
    system.allocate = lambda fd, size: None
try:
    with staged_file(Path(sys.argv[2]), overwrite=True, inputs=[]) as staged:
        with SafetensorsWriter(staged, [TensorSpec("a", "U8", (base.size,))], {}) as writer:
            print("started")
            writer.copy("a", ByteRange(base, 0, base.size))
except MachineError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_full_disk_is_said_before_any_work_and_leaves_the_old_output(tmp_path: Path, when: str) -> None:
    (tmp_path / "base").write_bytes(b"\7" * 300_000)
    write_safetensors(tmp_path / "out", {}, {MARK: "0.1"})
    old = (tmp_path / "out").read_bytes()

    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "base"), str(tmp_path / "out"), when],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (5, "")
    assert ("started" in done.stdout) == (when == "late")
    assert (" bytes are needed" in done.stdout) == (when == "early")
    assert "hint: " in done.stdout
    assert snapshot(tmp_path) == {"base": b"\7" * 300_000, "out": old}


def test_input_changed_during_the_copy_leaves_no_output(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "base", {"a": torch.arange(1000.0)}, {})
    location = read_header(tmp_path / "base").tensors["a"].location
    assert location is not None
    files.read_bytes(location, 0, 1)
    os.truncate(tmp_path / "base", 2000)

    with (
        pytest.raises(LoraToolsError, match="shorter"),
        staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging,
        SafetensorsWriter(staging / "x", [TensorSpec("a", "F32", (1000,))], {}) as writer,
    ):
        writer.copy("a", location)

    assert [path.name for path in tmp_path.iterdir()] == ["base"]
