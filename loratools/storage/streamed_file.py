"""A file of tensors whose layout is known before the first byte, and whose bytes arrive in any order.

A file counts as written only when every byte of every tensor was, and has reached the disk. Which format it has is said
by the layout alone.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from loratools.storage import system
from loratools.storage.files import machine_error, read_back, reserve, write_at

_Writer = TypeVar("_Writer", bound="StreamedFile")


@dataclass(frozen=True)
class FileLayout:
    """The first bytes of a file, where each tensor begins (from the start of the file), and how long it will be."""

    header: bytes
    offsets: dict[str, int]
    size: int


class StreamedFile:
    """One file being written. Any thread may write any part; each part once.

    It stays open until it is finished, or until `release`: a checkpoint may have more files than a process may open.

    `sizes` are the bytes of each tensor. Leaving the `with` block in order calls `finish`; leaving it by an exception
    removes the file, unless another run may go on with it.
    """

    def __init__(self, path: Path, layout: FileLayout, sizes: Mapping[str, int], *, keep: bool = False) -> None:
        """Begin a file; with `keep`, go on with one that is there, where its header and size are those of this one."""
        self.path = path
        self.layout = layout
        self._keep = keep
        self._sizes = dict(sizes)
        # First byte and one past the last of what was written, from the start of the file.
        self._written: list[tuple[int, int]] = []
        try:
            resumed = self._resumed(path) if keep else None
            self.fd = resumed if resumed is not None else system.create(path)
        except OSError as error:
            raise machine_error(error, "create", path) from error
        self._open = True
        self._finished = False
        try:
            reserve(self.fd, self.layout.size, path)
            write_at(self.fd, self.layout.header, 0, path=path)
        except BaseException:
            self.abandon()
            raise

    def _resumed(self, path: Path) -> int | None:
        """A descriptor of the file that is there; None, and no file, where it is not the beginning of this one."""
        try:
            fd = system.open_to_write(path)
        except FileNotFoundError:
            return None
        header = memoryview(bytearray(len(self.layout.header)))
        status = system.fstat(fd)
        # With a second name it is the output already, which is not written to.
        if status.st_size == self.layout.size and status.st_nlink == 1:
            read_back(fd, header, 0)
        if bytes(header) == self.layout.header:
            return fd
        system.close(fd)
        system.remove_file(path)
        return None

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            if not self._finished:
                self.finish()
        elif self._keep:
            self.close()
        else:
            self.abandon()

    def release(self) -> None:
        """Close the file for now; whatever is written to it from here on opens it again, for as long as it takes.

        Raises:
            MachineError: The disk failed.
        """
        try:
            self._close()
        except OSError as error:
            raise machine_error(error, "write", self.path) from error

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor to write to and to read back from, valid within the `with` block.

        Raises:
            MachineError: The file cannot be opened any more.
        """
        if self._open:
            yield self.fd
            return
        try:
            fd = system.open_to_write(self.path)
        except OSError as error:
            raise machine_error(error, "write", self.path) from error
        try:
            yield fd
        finally:
            try:
                system.close(fd)
            except OSError as error:
                raise machine_error(error, "write", self.path) from error

    def offset(self, name: str) -> int:
        """Where the tensor begins, from the start of the file."""
        return self.layout.offsets[name]

    def size_of(self, name: str) -> int:
        """How many bytes the tensor has."""
        return self._sizes[name]

    def account(self, name: str, start: int, nbytes: int) -> None:
        """Note that bytes of a tensor were written by other means, in `opened` or by another process."""
        self.account_range(self.layout.offsets[name] + start, nbytes)

    def account_range(self, offset: int, nbytes: int) -> None:
        """Note the same of bytes of any tensors, by their place from the start of the file."""
        self._written.append((offset, offset + nbytes))

    def finish(self) -> None:
        """Make the file durable and close it.

        Raises:
            RuntimeError: Not every byte was written, which is a bug of the caller.
            MachineError: The disk failed.
        """
        spans = _united(self._written)
        starts = [start for start, _ in spans]
        for name, size in self._sizes.items():
            begin = self.layout.offsets[name]
            span = bisect_right(starts, begin) - 1
            end = min(spans[span][1] - begin, size) if span >= 0 else 0
            if end < size:
                raise RuntimeError(f"{self.path}: {name} was written to byte {max(0, end)} of {size}")
        try:
            with self.opened() as fd:
                system.fsync(fd)
            self._close()
        except OSError as error:
            raise machine_error(error, "write", self.path) from error
        self._finished = True

    def close(self) -> None:
        """Close the file as it is, finished or not."""
        with contextlib.suppress(OSError):
            self._close()

    def abandon(self) -> None:
        """Close and remove the file."""
        self.close()
        with contextlib.suppress(OSError):
            system.remove_file(self.path)

    def _close(self) -> None:
        if self._open:
            self._open = False
            system.close(self.fd)


def _united(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same places in order, those that touch or overlap as one."""
    united: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(united[-1][1], stop)
        else:
            united.append((start, stop))
    return united
