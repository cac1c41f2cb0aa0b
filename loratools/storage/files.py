"""Reading and writing bytes of files, with errors that name the file and say what to do.

Inputs are read by position through a few shared descriptors, never mapped: an input that shrinks while it is mapped
kills the process, one that is read raises `ChangedInputError`. What the system is asked for is in `system`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from loratools.errors import ChangedInputError, InputError, LoraToolsError, MachineError, UsageError
from loratools.short_repr import printable
from loratools.storage import system
from loratools.storage.deferred_files import DeferredFile, deferred
from loratools.storage.origins import shown
from loratools.tensors.files import ByteRange, FileId

# Descriptors of inputs kept open. Shards are read in order, so few are in use at once, and a process may have no more
# than 64 open in all.
_MOST_OPEN = 16
# Copies that the kernel cannot make go through a buffer of this size: small enough for the cache of one core.
_COPY_BLOCK = 1 << 20
# The kernel copies in steps of this size, and begins to write each to disk while it copies the next: 1 GiB copied and
# synced took 1.3 s instead of 4.0 s.
_KERNEL_BLOCK = 32 << 20
_WORTH_WRITEBACK = 1 << 20
# A model is too large to be hashed whole at each run: its header, which names every tensor, and pieces from all over.
_PIECES = 64
_PIECE_BYTES = 1 << 16

# Called with every file that is identified or read in this context (`held_inputs`).
observed: ContextVar[Callable[[FileId], None] | None] = ContextVar("observed", default=None)

_FULL = {
    getattr(errno, name): words
    for name, words in (
        ("ENOSPC", "no space left on the disk"),
        ("EDQUOT", "disk quota used up"),
        ("EFBIG", "the file would be larger than this system or its limits allow"),
    )
    if hasattr(errno, name)
}


def quoted(name: str | Path) -> str:
    """A name for a message: in quotes, on one line, unprintable characters escaped, not too long.

    What is in a folder of an address, which is a temporary one, is called by the address.
    """
    text = shown(name)
    if len(text) > 200:
        text = text[:150] + "…" + text[-40:]
    return f"'{printable(text)}'"


def machine_error(error: OSError, doing: str, path: Path | None = None) -> LoraToolsError:
    """What a failed call means to a person; `doing` completes "could not …"."""
    if isinstance(error, LoraToolsError):  # MachineError is an OSError too, and has said it already
        return error
    about = f"{doing} {quoted(path)}" if path is not None else doing
    if error.errno == errno.EFBIG:
        hint: str | None = "write to a file system for larger files, or raise the limit (ulimit -f)"
        return MachineError(f"could not {about}: {_FULL[errno.EFBIG]}", hint=hint)
    if error.errno in _FULL:
        hint = "free some space, or write to another disk"
        if path is not None and (free := _free_space_or_none(path)) is not None:
            hint = f"{free:,} bytes are free there; {hint}"
        return MachineError(f"could not {about}: {_FULL[error.errno]}", hint=hint)
    if error.errno in (errno.EACCES, errno.EPERM):
        return MachineError(f"could not {about}: no permission", hint="check the owner and mode of the file and folder")
    if error.errno == errno.EROFS:
        return MachineError(f"could not {about}: the file system is read-only", hint="write to another folder")
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(f"could not {about}: the name is too long")
    reason = (error.strerror or str(error)).lower()
    hint = "the disk reported a failure; check it" if error.errno == errno.EIO else None
    return MachineError(f"could not {about}: {reason}", hint=hint)


def identify(path: Path) -> FileId:
    """Look at a file without opening it, so that a FIFO or a device cannot block; links are followed.

    Raises:
        UsageError: There is no such file.
        InputError: It is a folder, FIFO, socket or device.
    """
    try:
        status = system.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        try:
            system.lstat(path)
        except OSError:
            raise UsageError(f"there is no file {quoted(path)}") from error
        target = quoted(system.real_path(path))
        raise UsageError(f"{quoted(path)} is a link to {target}, which does not exist") from error
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"{quoted(path)} cannot be the name of a file") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{quoted(path)} is a link that leads back to itself") from error
        raise machine_error(error, "look at", path) from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{quoted(path)} is a folder; a file is needed", hint=_model_file_inside(path))
    if not stat.S_ISREG(status.st_mode):
        kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
        kind = next((kind_name for test, kind_name in kinds if test(status.st_mode)), "a device")
        raise InputError(f"{quoted(path)} is {kind}; a regular file is needed", hint="copy its content to a file first")
    file = _file_id(path, status)
    if (observer := observed.get()) is not None:
        observer(file)
    return file


def is_there(path: Path) -> bool:
    """Whether anything has the name, be it a broken link or a FIFO: reading it then says what is wrong with it."""
    try:
        return system.exists(path)
    except ValueError:  # a NUL in the name
        return False


def read_bytes(location: ByteRange, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes start:stop of the range.

    Raises:
        ChangedInputError: The file is not what it was when it was identified.
    """
    data = bytearray((location.nbytes if stop is None else stop) - start)
    read_into(location, start, data)
    return bytes(data)


def read_into(location: ByteRange, start: int, buffer: memoryview | bytearray) -> None:
    """Fill `buffer` from byte `start` of the range on.

    Raises:
        ChangedInputError: The file is not what it was when it was identified.
    """
    view = memoryview(buffer).cast("B")
    if start < 0 or start + len(view) > location.nbytes:
        raise ValueError(f"bytes {start}:{start + len(view)} are outside a range of {location.nbytes}")
    if not len(view):
        return
    if (deferred_file := deferred(location.file.path)) is not None:
        data = deferred_file.read(location.offset + start, location.offset + start + len(view))
        if data is not None:
            view[:] = data
            return
        location = _downloaded(location, deferred_file)
    with _inputs.borrow(location.file) as fd:
        try:
            _fill(location.file, fd, view, location.offset + start)
        except OSError as error:
            raise _input_error(error, location.file) from error


@contextmanager
def reading(location: ByteRange) -> Iterator[Callable[[int, memoryview], None]]:
    """Within, a function that fills a buffer from a place in the range on: `read_into` for many small reads."""
    if deferred(location.file.path) is not None:
        yield lambda start, buffer: read_into(location, start, buffer)
        return
    with _inputs.borrow(location.file) as fd:

        def read(start: int, buffer: memoryview) -> None:
            try:
                _fill(location.file, fd, buffer, location.offset + start)
            except OSError as error:
                raise _input_error(error, location.file) from error

        yield read


def copy_range(location: ByteRange, out_fd: int, out_offset: int, *, path: Path | None = None) -> None:
    """Write the range to `out_fd` at `out_offset`, inside the kernel where it can; `path` is for error messages.

    Raises:
        ChangedInputError: The input is not what it was when it was identified.
        MachineError: The disk is full or failed.
    """
    if (deferred_file := deferred(location.file.path)) is not None:
        location = _downloaded(location, deferred_file)
    copied = 0
    with _inputs.borrow(location.file) as fd:
        try:
            while copied < location.nbytes:
                remaining = min(_KERNEL_BLOCK, location.nbytes - copied)
                count = system.copy_inside_kernel(fd, out_fd, remaining, location.offset + copied, out_offset + copied)
                if count == 0:
                    break
                start_writeback(out_fd, out_offset + copied, count)
                copied += count
        except OSError as error:
            raise machine_error(error, "write", path) from error
    if copied == location.nbytes:
        return
    buffer = memoryview(bytearray(min(_COPY_BLOCK, location.nbytes - copied)))
    while copied < location.nbytes:
        block = buffer[: location.nbytes - copied]
        read_into(location, copied, block)
        write_at(out_fd, block, out_offset + copied, path=path)
        copied += len(block)


def copy_file(location: ByteRange, path: Path) -> None:
    """Write the range to a file that must not exist yet.

    Raises:
        ChangedInputError: The input is not what it was when it was identified.
        MachineError: The disk is full or failed.
    """
    try:
        fd = system.create(path)
        try:
            copy_range(location, fd, 0, path=path)
        finally:
            system.close(fd)
    except OSError as error:
        raise machine_error(error, "write", path) from error


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int, *, path: Path | None = None) -> None:
    """Write all of `data` at `offset`; `path` is for error messages.

    Raises:
        MachineError: The disk is full or failed.
    """
    view = memoryview(data).cast("B")
    try:
        while len(view):
            count = system.write_from(fd, view, offset)
            view = view[count:]
            offset += count
    except OSError as error:
        raise machine_error(error, "write", path) from error


def read_back(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with what has been written to `fd` at `offset`."""
    try:
        while len(buffer):
            count = system.read_into(fd, buffer, offset)
            if count == 0:
                raise MachineError("what was written could not be read back: the file ends too early")
            buffer = buffer[count:]
            offset += count
    except OSError as error:
        raise machine_error(error, "read back what was written") from error


def reserve(fd: int, nbytes: int, path: Path) -> None:
    """Make a new file as long as it will be, so that a disk without the room says so before the work.

    Raises:
        MachineError: There is not so much room; it names how much is needed.
    """
    try:
        system.allocate(fd, nbytes)
    except OSError as error:
        full = machine_error(error, "write", path)
        if not isinstance(full, MachineError):
            raise full from error
        raise MachineError(full.message, hint=full.hint, details=[f"{nbytes:,} bytes are needed"]) from error


def is_without_room(error: OSError) -> bool:
    """Whether what is to be written does not fit: the disk, a quota, or a limit on files."""
    return error.errno in _FULL


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to start writing these bytes to disk now, so that the fsync at the end is short.

    Does nothing for a few bytes, so that it may follow every write.
    """
    if nbytes >= _WORTH_WRITEBACK:
        system.start_writeback(fd, offset, nbytes)


def advise_sequential(location: ByteRange) -> None:
    """Tell the kernel that the range will be read from front to back."""
    if deferred(location.file.path) is not None:
        return
    with _inputs.borrow(location.file) as fd:
        system.advise(fd, location.offset, location.nbytes, "SEQUENTIAL")


def read_whole(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        UsageError: There is no such file.
        InputError: It is no regular file.
        ChangedInputError: It changed while it was being read.
    """
    file = identify(path)
    return read_bytes(ByteRange(file, 0, file.size))


def close_inputs() -> None:
    """Close the descriptors kept for inputs; those in use are closed after their use."""
    _inputs.close()


def free_space(path: Path) -> int:
    """Bytes that may still be written at `path`, which need not exist yet."""
    from shutil import disk_usage

    place = system.real_path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return disk_usage(place).free
    except OSError as error:
        raise machine_error(error, "look at", place) from error


def sha256(path: Path) -> str:
    """Digest of the file's content, in hexadecimal."""
    from hashlib import sha256 as new

    file = identify(path)
    digest = new()
    content = ByteRange(file, 0, file.size)
    buffer = memoryview(bytearray(min(_COPY_BLOCK, file.size)))
    advise_sequential(content)
    for start in range(0, file.size, _COPY_BLOCK):
        block = buffer[: file.size - start]
        read_into(content, start, block)
        digest.update(block)
    return digest.hexdigest()


def fingerprint(file: FileId, header_bytes: int = 0, *, pieces: int = _PIECES, piece_bytes: int = _PIECE_BYTES) -> str:
    """SHA-256 of a file's size, header, and pieces (64 of 64 KiB) spread evenly over the rest: all of a small file."""
    from hashlib import sha256 as new

    digest = new(file.size.to_bytes(8, "little"))
    content = ByteRange(file, 0, file.size)
    digest.update(read_bytes(content, 0, header_bytes))
    values = file.size - header_bytes
    if values <= pieces * piece_bytes:
        digest.update(read_bytes(content, header_bytes))
        return "sha256-sampled:" + digest.hexdigest()
    for i in range(pieces):
        start = header_bytes + i * values // pieces
        digest.update(read_bytes(content, start, min(start + piece_bytes, file.size)))
    return "sha256-sampled:" + digest.hexdigest()


def is_sampled_whole(file: FileId) -> bool:
    """Whether the pieces of a `fingerprint` are all of the file."""
    return file.size <= _PIECES * _PIECE_BYTES


def _file_id(path: Path, status: os.stat_result) -> FileId:
    return FileId(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


def _downloaded(location: ByteRange, deferred_file: DeferredFile) -> ByteRange:
    """The same range in the file that was downloaded."""
    if (known := _contents.get(deferred_file.path)) is not None:
        return ByteRange(known, location.offset, location.nbytes)
    file = identify(deferred_file.bring())
    if file.size != location.file.size:
        raise ChangedInputError(
            f"{quoted(file.path)} has {file.size:,} bytes, and {location.file.size:,} were announced",
            hint="download it again: delete that file first",
        )
    _contents[deferred_file.path] = file
    return ByteRange(file, location.offset, location.nbytes)


def _model_file_inside(folder: Path) -> str | None:
    names = ("adapter_model", "model", "pytorch_lora_weights", "adapters")
    model_file = next((path for name in names if (path := folder / f"{name}.safetensors").exists()), None)
    return f"did you mean {quoted(model_file)}?" if model_file is not None else None


def _free_space_or_none(path: Path) -> int | None:
    try:
        return free_space(path)
    except (LoraToolsError, OSError):
        return None


def _fill(file: FileId, fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = system.read_into(fd, view, offset)
        if count == 0:
            raise ChangedInputError(
                f"{quoted(file.path)} has become shorter: it ends at byte {offset:,}, and had {file.size:,}",
                hint="let whatever writes it finish, then start again",
            )
        view = view[count:]
        offset += count


def _compare(file: FileId, status: os.stat_result) -> None:
    if _file_id(file.path, status) == file:
        return
    change = "it was rewritten"
    if status.st_size != file.size:
        change = f"it had {file.size:,} bytes and now has {status.st_size:,}"
    raise ChangedInputError(
        f"{quoted(file.path)} changed while it was being read: {change}",
        hint="let whatever writes it finish, then start again",
    )


def _input_error(error: OSError, file: FileId) -> LoraToolsError:
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return ChangedInputError(f"{quoted(file.path)} no longer exists", hint="restore it, then start again")
    return machine_error(error, "read", file.path)


class _Opened:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.closing = False


class _Inputs:
    """Descriptors of inputs, shared by threads; the least recently used one is closed, never one in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: OrderedDict[FileId, _Opened] = OrderedDict()

    @contextmanager
    def borrow(self, file: FileId) -> Iterator[int]:
        if (observer := observed.get()) is not None:
            observer(file)
        with self._lock:
            opened = self._opened.get(file)
            if opened is None:
                opened = self._opened[file] = _Opened(self._open(file))
            self._opened.move_to_end(file)
            opened.users += 1
        try:
            yield opened.fd
        finally:
            with self._lock:
                opened.users -= 1
                if opened.closing and not opened.users:
                    _close_input(opened.fd)
                self._evict(_MOST_OPEN)

    def close(self) -> None:
        with self._lock:
            for opened in self._opened.values():
                if opened.users:
                    opened.closing = True
                else:
                    _close_input(opened.fd)
            self._opened.clear()

    def _open(self, file: FileId) -> int:
        if deferred(file.path) is not None:
            raise ValueError(f"{file.path} has no content of its own")
        try:
            try:
                fd = system.open_to_read(file.path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._evict(0)
                fd = system.open_to_read(file.path)
            try:
                _compare(file, system.fstat(fd))
            except BaseException:
                _close_input(fd)
                raise
        except OSError as error:
            raise _input_error(error, file) from error
        return fd

    def _evict(self, most: int) -> None:
        if len(self._opened) <= most:
            return
        for file in [file for file, opened in self._opened.items() if not opened.users][: len(self._opened) - most]:
            _close_input(self._opened.pop(file).fd)


def _close_input(fd: int) -> None:
    with suppress(OSError):  # nothing was written through it, and it is closed in any case
        system.close(fd)


_inputs = _Inputs()
# What was downloaded for a file whose bytes lie elsewhere, by the name that it has here.
_contents: dict[Path, FileId] = {}


def _forget_inputs() -> None:
    # A lock that another thread of the parent held would never be released in the child.
    global _inputs
    _inputs = _Inputs()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inputs)
