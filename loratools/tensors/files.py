"""Where the bytes of a tensor are: a file, identified as it was when it was first read, and a range of its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FileId:
    """A file and its state when it was first read, so that a later read can detect a change.

    Attributes:
        path: Its path.
        size: Its size in bytes.
        mtime_ns: When its content was last modified, in nanoseconds; programs can set this.
        inode: Its inode number in the file system.
        ctime_ns: When its inode last changed, in nanoseconds; programs cannot set this. It is not compared, since a new
            name or link does not change the content.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int = field(default=0, compare=False)

    def __hash__(self) -> int:
        # The path is not compared: see `ByteRange`.
        return hash((self.inode, self.mtime_ns))


@dataclass(frozen=True)
class ByteRange:
    """The place of a contiguous, little-endian, row-major tensor in a file.

    Attributes:
        file: The file.
        offset: The offset of the values, in bytes.
        nbytes: The size of the values, in bytes.
    """

    file: FileId
    offset: int
    nbytes: int

    def __hash__(self) -> int:
        # The path is not compared: that would cost more than all the rest, for each of 90,000 tensors.
        return hash((self.file.inode, self.offset, self.nbytes))
