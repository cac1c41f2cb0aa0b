"""An input that is held is at the end what it was when it was first seen, whatever its size and times say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loratools.errors import ChangedInputError
from loratools.storage.commit import staged_file, staged_folder
from loratools.storage.files import identify, read_bytes
from loratools.storage.held_inputs import holding_inputs
from loratools.tensors.files import ByteRange

BYTES = bytes(range(256)) * 8000


def same_size_and_times(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(1_234_567)  # between the pieces that are hashed
        file.write(b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(BYTES)
    path.with_name("new").replace(path)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "same size and times": (same_size_and_times, "time set back"),
    "longer": (lambda path: path.write_bytes(BYTES + b"x"), "now has 2,048,001"),
    "written anew": (lambda path: path.write_bytes(BYTES[::-1]), "written anew"),
    "replaced": (replaced, "written anew"),
    "removed": (lambda path: path.unlink(), "no longer exists"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.write_bytes(BYTES)
    return path


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("place", [staged_folder, staged_file, None])
def test_change_after_opening_writes_nothing(source: Path, how: str, place: Callable | None) -> None:
    change, words = CHANGES[how]
    out = source.with_name("out")

    def run() -> None:
        file = identify(source)
        time.sleep(0.01)  # the clock of a file system may tick every few milliseconds only
        if place is None:
            change(source)
            return
        with place(out, overwrite=False, inputs=[source]) as staged:
            (staged / "x" if place is staged_folder else staged).write_bytes(read_bytes(ByteRange(file, 0, 5)))
            change(source)

    with pytest.raises(ChangedInputError) as caught, holding_inputs():
        run()

    assert caught.value.exit_code == 5
    assert len(caught.value.details) == 1
    assert words in caught.value.details[0]
    assert str(source) in caught.value.details[0]
    assert not out.exists()


def test_change_is_the_error_in_place_of_its_consequence(source: Path) -> None:
    with pytest.raises(ChangedInputError) as caught, holding_inputs():  # noqa: PT012
        identify(source)
        source.write_bytes(b"short")
        raise RuntimeError("the self-check failed")

    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_changes_without_its_content_is_no_change(source: Path) -> None:
    with holding_inputs(), staged_folder(source.with_name("out"), overwrite=False, inputs=[source]) as staging:
        read_bytes(ByteRange(identify(source), 0, 5))
        os.link(source, source.with_name("second name"))
        source.chmod(0o600)
        (staging / "x").touch()

    assert source.with_name("out").exists()


def test_what_is_written_is_no_input(source: Path) -> None:
    with holding_inputs():
        with staged_folder(source.with_name("out"), overwrite=False, inputs=[source]) as staging:
            (staging / "x").write_text("x")
            identify(staging / "x")
        with staged_folder(source.with_name("out"), overwrite=True, inputs=[source]) as staging:
            (staging / "x").write_text("y")


def test_unheld_files_may_change(source: Path) -> None:
    identify(source)
    with holding_inputs():
        source.write_bytes(b"before it is opened")
        assert identify(source).size == 19
    source.write_bytes(b"after all is done")
