"""Every input of a verb is at its end what it was when it was opened, or the verb fails and writes nothing.

While `holding_inputs` is active, each file that is identified or read is noted with its size, times and inode and a
digest of pieces from all over it. Before an output takes its place, and where nothing is written at the end, all are
looked at again. A file whose size, time of writing and pieces are the same was still written to if the system's own
time of change moved, which no program can set back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loratools.errors import ChangedInputError, LoraToolsError
from loratools.storage import system
from loratools.storage.deferred_files import deferred
from loratools.storage.files import fingerprint, observed, quoted
from loratools.tensors.files import FileId

# Less than what a record of a merge hashes: each input is read twice, and most have many shards.
_PIECES = 16
_PIECE_BYTES = 1 << 14


class _HeldInputs:
    def __init__(self) -> None:
        self.files: dict[FileId, tuple[os.stat_result, str]] = {}
        self.outputs: tuple[Path, ...] = ()
        # Whether files of a folder are those of an output, by the folder.
        self._in_output: dict[str, bool] = {}
        self.compared = False

    def add(self, file: FileId) -> None:
        if file in self.files or self._is_output(file.path):
            return
        if deferred(file.path) is not None:
            return  # what is fetched is pinned, and a digest of pieces would fetch them
        try:
            # Before the digest, which reads the file and so comes back here.
            self.files[file] = (system.stat(file.path), "")
            self.files[file] = (system.stat(file.path), _digest(file))
            self.compared = False
        except (LoraToolsError, OSError):
            # Whoever reads it will say what is wrong with it, or that it changed already.
            return

    def _is_output(self, path: Path) -> bool:
        # An extraction looks at tens of thousands of small files in one folder, and paths are slow to compare.
        name = str(path)
        folder = name[: -len(path.name)]
        if folder not in self._in_output:
            self._in_output[folder] = any(Path(folder).is_relative_to(out) for out in self.outputs)
        return self._in_output[folder] or any(name == str(out) for out in self.outputs)

    def leave_out(self, output: Path) -> None:
        """Hold nothing at this place from now on."""
        self.outputs = (*self.outputs, output)
        self._in_output.clear()
        self.files = {file: noted for file, noted in self.files.items() if not file.path.is_relative_to(output)}

    def changed(self) -> list[str]:
        self.compared = True
        return [
            change for file, (before, digest) in list(self.files.items()) if (change := _change(file, before, digest))
        ]


_current: ContextVar[_HeldInputs | None] = ContextVar("held_inputs", default=None)


@contextmanager
def holding_inputs(*, apart: bool = False) -> Iterator[None]:
    """Within, every file that is opened is held to what it was; one inside of another is part of it.

    Args:
        apart: Inside of another one, what is opened is held by this one alone, and to the end of this one.

    Raises:
        ChangedInputError: An input is no longer what it was: at the end, or in place of an error that is likely its
            consequence.
    """
    if _current.get() is not None and not apart:
        yield
        return
    held = _HeldInputs()
    token = _current.set(held)
    observer = observed.set(held.add)
    try:
        yield
        if not held.compared:
            _refuse(held.changed())
    except ChangedInputError:
        raise
    except Exception as error:
        if changed := held.changed():
            raise _error(changed) from error
        raise
    finally:
        observed.reset(observer)
        _current.reset(token)


def require_unchanged() -> None:
    """Raise ChangedInputError where an input that is held is no longer what it was."""
    held = _current.get()
    if held is not None:
        _refuse(held.changed())


def hold_no(path: Path) -> None:
    """Leave out what is under `path` from now on: it is an output, or what will become one."""
    held = _current.get()
    if held is not None:
        held.leave_out(path)


def _refuse(changed: list[str]) -> None:
    if changed:
        raise _error(changed)


def _error(changed: list[str]) -> ChangedInputError:
    count = "an input" if len(changed) == 1 else f"{len(changed)} inputs"
    return ChangedInputError(
        f"{count} changed while being read; nothing was written",
        details=changed,
        hint="let whatever writes it finish, then start again",
    )


def _change(file: FileId, before: os.stat_result, digest: str) -> str | None:
    try:
        now = system.stat(file.path)
    except OSError:
        return f"{quoted(file.path)} no longer exists"
    if now.st_size != file.size:
        return f"{quoted(file.path)} had {file.size:,} bytes and now has {now.st_size:,}"
    if (now.st_mtime_ns, now.st_ino) != (file.mtime_ns, file.inode):
        return f"{quoted(file.path)} was written anew"
    if now.st_ctime_ns != before.st_ctime_ns and _same_standing(now, before):
        return f"{quoted(file.path)} was written to, and its time set back"
    try:
        return None if not digest or _digest(file) == digest else f"{quoted(file.path)} was written to"
    except (LoraToolsError, OSError):
        return f"{quoted(file.path)} can no longer be read"


def _same_standing(now: os.stat_result, before: os.stat_result) -> bool:
    """Whether nothing but the content can have moved the time of change: neither mode, owner nor number of names."""
    return all(getattr(now, name) == getattr(before, name) for name in ("st_mode", "st_uid", "st_gid", "st_nlink"))


def _digest(file: FileId) -> str:
    return fingerprint(file, pieces=_PIECES, piece_bytes=_PIECE_BYTES)
