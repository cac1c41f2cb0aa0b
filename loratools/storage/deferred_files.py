"""Files whose bytes lie elsewhere: on this disk they have a name and a size, and their content is fetched when read.

A source that is not on this machine gets a folder in which every file has its true size and no content. Whoever reads
bytes of one through `files` gets them from here: the first bytes, in which headers are, and a few others by ranges; a
file whose values are read is downloaded once, whole, and read from where it was downloaded to. The empty content of
the file itself is never read, so that its zeros cannot be taken for values.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What is fetched when anything near the beginning is read: the header of an adapter of 448 tensors has 64 KB.
FRONT_BYTES = 96 << 10
# A read of more than this is one of values.
_FEW_BYTES = 64 << 10
# The longest header of a safetensors file that is accepted, and what may be read of another from its beginning on.
_LONGEST_HEADER = 100_000_000
_LONGEST_FRONT = 32 << 20
# A request takes as long as so many bytes of a download: scattered reads beyond that are slower than the file.
_BYTES_PER_REQUEST = 4 << 20
_FEWEST_REQUESTS = 16
# How many files are asked for their first bytes at once.
_AT_ONCE = 8


@dataclass(eq=False)
class DeferredFile:
    """A file whose bytes are fetched when they are read.

    Attributes:
        path: Its name on this machine, under which it has its size and no content.
        size: Its size in bytes.
        fetch: Returns the bytes from a position to another.
        download: Brings the file onto this machine and returns where it is.
    """

    path: Path
    size: int
    fetch: Callable[[int, int], bytes]
    download: Callable[[], Path]
    downloaded: Path | None = None
    _parts: list[tuple[int, bytes]] = field(default_factory=list)
    _requests: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def read(self, start: int, stop: int) -> bytes | None:
        """Return the bytes from `start` to `stop`, or None where they are to be read from the downloaded file."""
        with self.lock:
            if self.downloaded is not None:
                return None
            if (held := self._held(start, stop)) is not None:
                return held
            if (wanted := self._range_to_fetch(start, stop)) is None:
                self.bring()
                return None
            self._parts.append((wanted[0], self.fetch(*wanted)))
            return self._held(start, stop)

    def bring(self) -> Path:
        """Download the file, once, and return where it is."""
        with self.lock:
            if self.downloaded is None:
                self.downloaded = self.download()
                self._parts.clear()
            return self.downloaded

    @property
    def is_held_whole(self) -> bool:
        """Whether all bytes have been read, and the file was not downloaded."""
        return self.downloaded is None and 0 < self.size <= self._end_of_front()

    def _held(self, start: int, stop: int) -> bytes | None:
        """The bytes, as far as parts that were fetched hold them one after the other; None if not all of them."""
        pieces: list[bytes] = []
        while start < stop:
            part = next(((at, data) for at, data in self._parts if at <= start < at + len(data)), None)
            if part is None:
                return None
            at, data = part
            pieces.append(data[start - at : stop - at])
            start += len(pieces[-1])
        return b"".join(pieces)

    def _range_to_fetch(self, start: int, stop: int) -> tuple[int, int] | None:
        """What to fetch so that the bytes are here; None if the file is to be downloaded."""
        front = min(self.size, FRONT_BYTES)
        if stop <= front:
            return 0, front
        if start == 0 and stop == self.size:
            return None
        fetched = self._end_of_front()
        if fetched and start <= fetched:
            header_end = self._header_end()
            if header_end is None and stop <= _LONGEST_FRONT and stop - start <= _BYTES_PER_REQUEST:
                # Of a format that does not say how long its header is: twice as much as before.
                return fetched, min(self.size, max(stop, 2 * fetched))
            if header_end is not None and stop <= header_end:
                return fetched, header_end
        if stop - start > _FEW_BYTES or self._requests >= max(_FEWEST_REQUESTS, self.size // _BYTES_PER_REQUEST):
            return None
        self._requests += 1
        begin = start - start % _FEW_BYTES
        return begin, min(self.size, max(stop, begin + _FEW_BYTES))

    def _end_of_front(self) -> int:
        """How far the file is held from its first byte on."""
        end = 0
        for at, data in sorted(self._parts, key=lambda part: part[0]):
            if at > end:
                break
            end = max(end, at + len(data))
        return end

    def _header_end(self) -> int | None:
        """Where the values of a safetensors file begin; None of another file."""
        first = self._held(0, min(9, self.size)) or b""
        length = int.from_bytes(first[:8], "little")
        is_header = len(first) == 9 and first[8:] == b"{" and 2 <= length <= min(_LONGEST_HEADER, self.size - 8)
        return 8 + length if is_header else None


_files: dict[Path, DeferredFile] = {}


def defer(file: DeferredFile) -> None:
    """Have reads of `file.path` answered by `file` from now on."""
    _files[file.path] = file


def deferred(path: Path) -> DeferredFile | None:
    """Return the file under this name whose bytes lie elsewhere; None if it is an ordinary one."""
    return _files.get(path) if _files else None


def fetch_fronts(paths: Iterable[Path]) -> None:
    """Fetch the first bytes of files that will be opened, several at once. Of ordinary files it does nothing.

    Raises:
        LoraToolsError: One cannot be fetched.
    """
    waiting = [file for path in paths if (file := deferred(path)) is not None]
    if len(waiting) > 1:
        # Imported here, since every start of the program imports this file and few have anything to fetch.
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: file.read(0, min(file.size, FRONT_BYTES)), waiting))


def download_all(paths: Sequence[Path]) -> None:
    """Bring files onto this machine before their values are read. Of ordinary files it does nothing.

    Raises:
        LoraToolsError: One cannot be downloaded.
    """
    for path in dict.fromkeys(paths):
        if (file := deferred(path)) is not None:
            file.bring()


def _release_locks() -> None:
    # A lock that another thread of the parent held would never be released in the child.
    for file in _files.values():
        file.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)
