# ruff: noqa: PTH101, PTH102, PTH104, PTH105, PTH106, PTH108, PTH112, PTH115, PTH116, PTH208
# (the methods of Path call the system where a test could not make them fail)
"""The only file of storage that calls the operating system, each call with what to do where it is missing.

Everything here raises plain OSError; `files` and `commit` say what it means to a person. A test that replaces this
module's `os` can make any call fail. Interrupted calls are repeated by Python itself (PEP 475), short ones here.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ctypes

# macOS refuses single transfers of 2 GiB and more; Linux shortens them.
_MOST_AT_ONCE = 1 << 30
_UNSUPPORTED = frozenset(
    getattr(errno, name)
    for name in ("EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EINVAL", "EXDEV", "ETXTBSY", "EBADF", "EPERM", "ENOTTY")
    if hasattr(errno, name)
)
# What a file system answers that has no second names for files, or no more of them.
UNSUPPORTED_LINKS = _UNSUPPORTED | {errno.EMLINK}
# Locks of Windows keep others from reading what is locked: a byte far behind the end of any file of ours.
_LOCKED_BYTE = 1 << 40
# Without pread and pwrite (Windows) the position belongs to the descriptor, so one thread at a time.
_position = threading.Lock()


def stat(path: Path) -> os.stat_result:
    return os.stat(path)


def lstat(path: Path) -> os.stat_result:
    return os.lstat(path)


def exists(path: Path) -> bool:
    """Whether there is anything under the name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def fstat(fd: int) -> os.stat_result:
    return os.fstat(fd)


def real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))


def open_to_read(path: Path) -> int:
    # O_NONBLOCK: should a FIFO have taken the place of the file since it was looked at, the open must not wait.
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))


def open_to_flush(path: Path) -> int:
    # Windows flushes only what is open for writing; elsewhere a file without write permission must do as well.
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) if sys.platform == "win32" else os.O_RDONLY)


def open_to_write(path: Path) -> int:
    """Open a file that is there, to write parts of it and to read them back."""
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def create(path: Path) -> int:
    """Open a file that must not exist yet, with mode 0666 less the umask."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def close(fd: int) -> None:
    os.close(fd)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read at `offset` into `buffer`; return the number of bytes, 0 only at the end of the file."""
    buffer = buffer[:_MOST_AT_ONCE]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    if hasattr(os, "pread"):
        data = os.pread(fd, len(buffer), offset)
    else:
        with _position:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_from(fd: int, data: memoryview, offset: int) -> int:
    """Write some of `data` at `offset`; return the number of bytes."""
    data = data[:_MOST_AT_ONCE]
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def copy_inside_kernel(source: int, target: int, count: int, source_offset: int, target_offset: int) -> int:
    """Copy up to `count` bytes between files; 0 where this system or this pair of files cannot, or at the end."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, min(count, _MOST_AT_ONCE), source_offset, target_offset)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise


def allocate(fd: int, size: int) -> None:
    """Make the file `size` bytes long and reserve them where the file system can."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(fd, size)


def fsync(fd: int) -> None:
    os.fsync(fd)


def fsync_folder(path: Path) -> None:
    """Make renames inside the folder durable; Windows and some network file systems cannot, and need not."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Ask for dirty pages to be written now; a wish, so nothing is reported."""
    function = _c_function("sync_file_range", "int64 int64 uint")
    if function is not None:
        function(fd, offset, count, 2)  # SYNC_FILE_RANGE_WRITE


def advise(fd: int, offset: int, count: int, advice: str) -> None:
    """Tell the kernel how a range will be read (`SEQUENTIAL`, `WILLNEED`); a wish, so nothing is reported."""
    try:
        os.posix_fadvise(fd, offset, count, getattr(os, f"POSIX_FADV_{advice}"))
    except (AttributeError, OSError):
        return


def make_folder(path: Path) -> None:
    os.mkdir(path)


def remove_folder(path: Path) -> None:
    os.rmdir(path)


def remove_file(path: Path) -> None:
    os.unlink(path)


def names_in(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def folders_in(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted; links are none."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def change_mode(path: Path, mode: int) -> None:
    os.chmod(path, mode)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def rename_over_empty(source: Path, target: Path) -> None:
    """Rename a folder; an empty one may be in the way, which Windows does not replace by itself."""
    if sys.platform == "win32" and os.path.isdir(target):
        os.rmdir(target)
    os.rename(source, target)


def replace(source: Path, target: Path) -> None:
    os.replace(source, target)


def hard_link(source: Path, target: Path) -> None:
    os.link(source, target)


def hard_link_unfollowed(source: Path, target: Path) -> None:
    """Give a file, or a link itself, a second name."""
    os.link(source, target, follow_symlinks=os.link not in os.supports_follow_symlinks)


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted there: such a folder cannot be renamed, nor another one put in its place."""
    if os.path.ismount(path):
        return True
    try:
        # A bind mount from the same file system, which containers have, is not told apart by its device.
        with open("/proc/self/mountinfo", "rb") as mounts:  # noqa: PTH123
            points = {line.split(b" ")[4] for line in mounts}
    except OSError:
        return False
    escaped = os.fsencode(path)
    for character in b"\\ \t\n":
        escaped = escaped.replace(bytes([character]), b"\\%03o" % character)
    return escaped in points


def may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def copy_attributes(source: Path, target: Path) -> None:
    """Give `target` the mode, times and extended attributes of `source`."""
    import shutil

    shutil.copystat(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    function = _c_function("renameat2", "path int path uint")
    if function is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(function(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def lock_folder(path: Path) -> int | None:
    """Hold the folder until the returned descriptor is closed; None if this system has no such locks.

    Raises:
        BlockingIOError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        os.close(fd)
        return None
    return fd


def lock_file(fd: int) -> bool:
    """Hold an open file until its descriptor is closed; False where this system or file system has no such locks.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if sys.platform == "win32":
        import msvcrt

        with _position:
            os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError(errno.EAGAIN, "the file is locked") from error
        return True
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def cut(fd: int, size: int) -> None:
    """Make a file that is open for writing this long."""
    os.ftruncate(fd, size)


def process_id() -> int:
    return os.getpid()


def process_lives(process: int) -> bool:
    """False only when it certainly does not; Windows' `os.kill` would end the process instead of asking."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def process_space() -> str:
    """Names the machine and process-id space, so that a process id of another one is not taken for ours."""
    import platform

    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return platform.node() + space


def random_hex(count: int) -> str:
    return os.urandom(count // 2).hex()


def _c_function(name: str, arguments: str) -> Any:
    """A function of the C library that Python does not wrap, or None; its first argument is an int."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    global _c_library
    if _c_library is None:
        _c_library = ctypes.CDLL(None, use_errno=True)
    function = getattr(_c_library, name, None)
    if function is not None:
        kinds = {"int": ctypes.c_int, "uint": ctypes.c_uint, "int64": ctypes.c_int64, "path": ctypes.c_char_p}
        function.argtypes = [ctypes.c_int, *(kinds[kind] for kind in arguments.split())]
    return function


_c_library: ctypes.CDLL | None = None
