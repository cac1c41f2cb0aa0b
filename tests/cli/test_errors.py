"""The error boundary: what goes wrong becomes a message, a hint and an exit code, and with --json one document."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import factories
import pytest
from cli_runner import CliRunner

from loratools._version import __version__
from loratools.cli import inspect as inspect_file
from loratools.cli import verbs
from loratools.cli.common.errors import Ended, run
from loratools.errors import (
    FormatError,
    LoraToolsError,
    MachineError,
    MismatchError,
    OutputExistsError,
    UndecidedError,
    UnsupportedError,
    UsageError,
)

BUG = "error: this is a bug in loratools: KeyError: 'x'\nhint: run again with --debug and report what it prints\n"


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> object:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UsageError("no"), 2, "error: no\n"),
        (OutputExistsError("'out' exists", hint="--overwrite"), 2, "error: 'out' exists\nhint: --overwrite\n"),
        (UndecidedError("no"), 3, "error: no\n"),
        (FormatError("no"), 4, "error: no\n"),
        (UnsupportedError("no"), 4, "error: no\n"),
        (MismatchError("2 do not fit", details=["a", "b"]), 4, "error: 2 do not fit\n  a\n  b\n"),
        (MachineError("no"), 5, "error: no\n"),
        (LoraToolsError("no"), 70, "error: no\n"),
        (KeyError("x"), 70, BUG),
        (click.exceptions.Exit(3), 3, ""),
        (
            click.BadParameter("Too low."),
            2,
            "error: invalid value: Too low\nhint: 'loratools --help' lists what there is\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Ended(15), 143, ""),
        (Ended(1), 129, ""),
        (BrokenPipeError(), 141, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/model.safetensors"),
            5,
            "error: no space left on device: '/out/model.safetensors'\n"
            "hint: free some space, or write elsewhere with -o\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/locked/x"),
            5,
            "error: permission denied: '/locked/x'\n"
            "hint: the permissions of the file or of its folder do not allow this\n",
        ),
        (OSError(errno.EIO, "Input/output error"), 5, "error: input/output error\n"),
        (
            MemoryError(),
            5,
            "error: out of memory\nhint: fewer --threads need less; so does closing other programs\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"),
            5,
            "error: out of memory\n  DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\n",
        ),
    ],
)
def test_error_ends_with_its_code_and_message(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), [], "merge") == code

    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == printed


def test_json_failure_is_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    error = MismatchError("2 do not fit", details=["a", "b"], hint="try")

    assert run(raising(error), ["--json"], "merge") == 4

    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "loratools": __version__,
        "schema_version": 1,
        "verb": "merge",
        "error": {"code": "mismatch", "message": "2 do not fit", "hint": "try", "details": ["a", "b"]},
    }
    assert told.err == "error: 2 do not fit\n  a\n  b\nhint: try\n"


def test_json_after_the_end_of_options_is_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    run(raising(UsageError("no")), ["--", "--json"], "inspect")

    assert capsys.readouterr().out == ""


def test_details_are_counted_beyond_ten_and_all_shown_with_v(capsys: pytest.CaptureFixture[str]) -> None:
    error = MismatchError("25 do not fit", details=[f"module {i}" for i in range(25)])

    run(raising(error), [], "merge")
    short = capsys.readouterr().err.splitlines()
    run(raising(error), ["-v"], "merge")
    full = capsys.readouterr().err.splitlines()

    assert short == ["error: 25 do not fit", *(f"  module {i}" for i in range(10)), "  … and 15 more"]
    assert full == ["error: 25 do not fit", *(f"  module {i}" for i in range(25))]


def test_names_from_files_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    error = FormatError("bad name 'a\x1b[2Jb\u202ec\nd'", details=["\x07"], hint="\x9b")

    run(raising(error), [], "inspect")

    assert capsys.readouterr().err == "error: bad name 'a\\x1b[2Jb\\u202ec\\nd'\n  \\x07\nhint: \\x9b\n"


def test_debug_shows_the_traceback_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    run(raising(FormatError("no")), ["--debug"], "inspect")

    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):\n")
    assert told.endswith("\nerror: no\n")


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["mrege"], "no verb named 'mrege'; there are: ", "did you mean 'merge'?"),
        (["inspect", "--jsn", "x"], "no option named '--jsn'", "did you mean --json?"),
        (["inspect"], "SOURCE... is missing", "usage: loratools inspect [OPTIONS] SOURCE..."),
        (["inspect", ""], "an empty argument names no source", None),
        (
            ["inspect", "x", "--rank-from", "b"],
            "invalid value for '--rank-from': 'b' is not one of 'tensors', 'config'",
            "",
        ),
        (["--nonsense"], "no option named '--nonsense'", "'loratools --help' lists what there is"),
    ],
)
def test_wrong_usage_ends_with_2_in_the_same_shape(args: list[str], message: str, hint: str | None) -> None:
    plain = CliRunner().invoke(verbs, args)
    document = CliRunner().invoke(verbs, [*args, "--json"])

    assert (plain.exit_code, plain.stdout) == (2, "")
    assert plain.stderr.startswith(f"error: {message}")
    assert document.exit_code == 2
    error = json.loads(document.stdout)["error"]
    assert error["code"] == "usage"
    assert error["message"].startswith(message)
    assert hint == "" or error["hint"] == hint


def test_no_arguments_show_the_help_and_end_with_2() -> None:
    done = CliRunner().invoke(verbs, [])

    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: loratools [OPTIONS] VERB [ARGUMENTS]...\n")


def test_bug_in_a_verb_ends_with_70(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("loratools.ops.inspect.verb.inspect", broken)

    done = CliRunner().invoke(inspect_verb(), ["inspect", str(tmp_path)])

    assert (done.exit_code, done.stdout, done.stderr) == (70, "", BUG)


def inspect_verb() -> click.Group:
    assert inspect_file.command.name == "inspect"
    return verbs


# ── whole processes ──


def loratools(*args: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratools", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_process_ends_with_the_code_and_keeps_the_streams_apart(tmp_path: Path) -> None:
    done = loratools("inspect", tmp_path / "nothing", "--json")

    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == f"there is no file or folder '{tmp_path}/nothing'"
    assert done.stderr == f"error: there is no file or folder '{tmp_path}/nothing'\n"


def test_closed_pipe_ends_with_141_and_without_a_word(tmp_path: Path) -> None:
    adapter = factories.adapter_folder(tmp_path / "adapter")
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [sys.executable, "-m", "loratools", "inspect", adapter], stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_stdout_ends_with_5(tmp_path: Path) -> None:
    adapter = factories.adapter_folder(tmp_path / "adapter")

    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device, not a path
        done = subprocess.run(
            [sys.executable, "-m", "loratools", "inspect", adapter], stdout=full, stderr=subprocess.PIPE, timeout=60
        )

    assert done.returncode == 5
    assert done.stderr.startswith(b"error: no space left on device\n")


def test_names_that_the_encoding_lacks_do_not_end_in_a_traceback(tmp_path: Path) -> None:
    adapter = factories.adapter_folder(tmp_path / "Größe-日本")

    done = loratools("inspect", adapter, env={**os.environ, "PYTHONIOENCODING": "ascii"})

    assert (done.returncode, done.stderr) == (0, "")
    assert "Gr\\xf6\\xdfe-\\u65e5\\u672c" in done.stdout


_SLEEPING = """
import sys, time
import loratools.ops.inspect.verb
def inspect(*sources, **options):
    try:
        print("started", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        print("cleaned", file=sys.stderr, flush=True)
loratools.ops.inspect.verb.inspect = inspect
from loratools.cli import main
sys.argv = ["loratools", "inspect", "x"]
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_unwinds_the_stack_and_gives_its_code(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", _SLEEPING], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    time.sleep(0.05)

    process.send_signal(number)
    _, told = process.communicate(timeout=30)

    assert process.returncode == code
    assert told.splitlines()[0] == "cleaned"
