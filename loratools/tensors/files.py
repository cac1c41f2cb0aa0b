"""Where the bytes of a tensor are: a file as it was when it was first read, and a range of its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FileId:
    """A file as it was when it was first read, so that a later read can tell that it has changed.

    Attributes:
        path: Where it is.
        size: Its size in bytes.
        mtime_ns: When it was last written, in nanoseconds, as programs may set it.
        inode: Its number in the file system.
        ctime_ns: When it or its names last changed, which programs cannot set; not compared, as a new name is no
            change of what is in the file.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int = field(default=0, compare=False)

    def __hash__(self) -> int:
        # Not by the path: see `ByteRange`.
        return hash((self.inode, self.mtime_ns))


@dataclass(frozen=True)
class ByteRange:
    """The place of a contiguous, little-endian, row-major tensor in a file.

    Attributes:
        file: The file.
        offset: Where the values begin, in bytes.
        nbytes: How many bytes they take.
    """

    file: FileId
    offset: int
    nbytes: int

    def __hash__(self) -> int:
        # Not by the path, which costs more than all the rest, for each of 90,000 tensors.
        return hash((self.file.inode, self.offset, self.nbytes))
