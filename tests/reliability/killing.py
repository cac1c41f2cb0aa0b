"""Runs that end as if they were killed: in a forked copy of the test's process, at a call to the system of our choice.

The copy ends without unwinding: no block is left, no file flushed or removed, locks go with the process.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from loratools.storage import files, system

# What storage asks the system for, save for what changes nothing and reads nothing.
CALLS = frozenset({
    "open", "close", "pread", "preadv", "pwrite", "fstat", "stat", "lstat", "fsync", "rename", "replace", "link",
    "unlink", "rmdir", "mkdir", "listdir", "posix_fallocate", "ftruncate", "copy_file_range", "chmod", "scandir",
})  # fmt: skip
KILLED = 9


class EndingOs:
    """The os module, whose n-th call ends the process; `after`: once the call is done."""

    def __init__(self, n: int, *, after: bool) -> None:
        self.n = n
        self.after = after
        self.numbers = itertools.count(1)

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: object, **kwargs: object) -> object:
            is_last = next(self.numbers) == self.n  # in one step: other threads count too
            if is_last and not self.after:
                os._exit(KILLED)
            try:
                return real(*args, **kwargs)
            finally:  # also where the call says that there is no such file
                if is_last:
                    os._exit(KILLED)

        return call


class AtOnce:
    """In place of a pool of threads: what is submitted is done at once, so that each run goes the same way."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., object], *args: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(work(*args))
        return future


def killed_at(n: int, job: Callable[[], object], *, after: bool = False) -> bool:
    """Do the job in a copy of this process that ends at its n-th call; whether it came so far."""
    files.close_inputs()
    return _ended(job, lambda: setattr(system, "os", EndingOs(n, after=after))) == KILLED


def killed_when(job: Callable[[], object]) -> None:
    """Do the job in a copy of this process, which the job itself ends with `os._exit`."""
    files.close_inputs()
    assert _ended(job, lambda: None) == KILLED


def _ended(job: Callable[[], object], prepare: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            prepare()
            job()
            status = 0
        finally:
            os._exit(status)
    _, how = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(how)
    assert code in (0, KILLED)
    return code


def content(path: Path) -> object:
    """Everything below a path, links not followed."""
    if path.is_dir() and not path.is_symlink():
        return {child.name: content(child) for child in sorted(path.iterdir())}
    return path.read_bytes() if path.exists() else None
