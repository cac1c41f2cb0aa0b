"""An output appears under its name complete, or not at all.

Everything is written into a hidden folder beside the output, `.NAME.loratools-PID-HEX`, flushed to disk, then renamed.
The folder is removed when the block that fills it fails. One that a killed process left is recognised by its owner
being gone: the process id in its name is free, in our own space of process ids, and nobody holds its lock. Each of the
two can be wrong alone (containers share folders but not process ids; some network file systems grant every lock).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import OutputExistsError, UsageError
from loratools.storage import system
from loratools.storage.files import machine_error, quoted

_OVERWRITE = "choose another name, or replace it with --overwrite"


def check_output(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Check, before any work, that the output may be written. An empty folder counts as no output.

    Raises:
        OutputExistsError: it is there and `overwrite` is False, or it is, holds or lies in one of the inputs.
        UsageError: it is no file or folder, or cannot be one.
    """
    real = _real(out)
    found = _stat_or_none(real)
    for given in inputs:
        _check_apart(out, real, found, given)
    if found is None:
        _check_parents(out, real)
        return
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise UsageError(f"{quoted(out)} is a device, FIFO or socket and stays", hint="choose another name")
    if stat.S_ISDIR(found.st_mode):
        names = _names_in(real)
        if names and not overwrite:
            raise OutputExistsError(f"the folder {quoted(out)} exists and is not empty", hint=_OVERWRITE)
        if names:
            _check_replaceable(out, names)
    elif not overwrite:
        raise OutputExistsError(f"{quoted(out)} exists", hint=_OVERWRITE)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends in order, it becomes `out` in one step, flushed to disk.

    On any exception it is removed and `out` is as before. With `overwrite` the old folder is swapped out as a whole,
    so nothing stale stays behind. What killed runs left beside `out` is removed.

    Raises:
        OutputExistsError: see `check_output`; also when another run has written `out` meanwhile.
        MachineError: the disk is full, or there is no permission.
    """
    real = _real(out)
    _recover(out, real)
    check_output(out, overwrite=overwrite, inputs=inputs)
    found = _stat_or_none(real)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{quoted(out)} is a file, and a folder is to be written", hint="choose another name")
    with _staging(out, real) as staging:
        yield staging
        try:
            _flush(staging)
            if found is not None:
                system.change_mode(staging, stat.S_IMODE(found.st_mode))
            _place_folder(out, staging, real, overwrite)
            system.fsync_folder(real.parent)
        except OSError as error:
            raise machine_error(error, "write", out) from error


@contextmanager
def staged_file(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Path]:
    """Give the path of a file to create; when the block ends in order, it becomes `out` in one step, flushed to disk.

    On any exception it is removed and `out` is as before. A link is followed, and stays.

    Raises:
        OutputExistsError: see `check_output`; also when another run has written `out` meanwhile.
        MachineError: the disk is full, or there is no permission.
    """
    check_output(out, overwrite=overwrite, inputs=inputs)
    real = _real(out)
    found = _stat_or_none(real)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{quoted(out)} is a folder, and a file is to be written", hint="add the name of the file")
    with _staging(out, real) as staging:
        staged = staging / real.name
        yield staged
        try:
            _flush(staging)
            if found is not None:
                system.change_mode(staged, stat.S_IMODE(found.st_mode))
            _place_file(out, staged, real, overwrite)
            system.fsync_folder(real.parent)
        except OSError as error:
            raise machine_error(error, "write", out) from error


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder on the disk of `out`, which is removed when the block ends, or by the next run.

    Raises:
        MachineError: there is no permission.
    """
    with _staging(out, _real(out)) as folder:
        yield folder


def stale_staging(out: Path) -> list[Path]:
    """Folders beside `out` that killed runs left, newest last."""
    real = _real(out)
    found = [(_stat_or_none(path), path) for path in _staging_folders(real) if _owner_is_gone(path)]
    return [path for _, path in sorted((status.st_mtime_ns, path) for status, path in found if status is not None)]


def _real(out: Path) -> Path:
    try:
        real = system.real_path(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{quoted(out)} cannot be the name of an output") from error
    if not real.name:
        raise UsageError(f"{quoted(out)} cannot be an output")
    return real


def _stat_or_none(path: Path) -> os.stat_result | None:
    try:
        return system.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{quoted(path)} is a link that leads back to itself") from error
        raise machine_error(error, "look at", path) from error


def _names_in(path: Path) -> list[str]:
    try:
        return system.names_in(path)
    except OSError as error:
        raise machine_error(error, "look into", path) from error


def _check_apart(out: Path, real: Path, found: os.stat_result | None, given: Path) -> None:
    """Refuse an output that is, holds or lies in an input. Compared by inode: links, mounts and case cannot hide it."""
    source = _stat_or_none(given)
    if source is None:
        return
    hint = "choose a place outside of the inputs"
    if found is not None and os.path.samestat(found, source):
        raise OutputExistsError(f"the output {quoted(out)} is also an input", hint=hint)
    if stat.S_ISDIR(source.st_mode) and _is_above(source, real):
        raise OutputExistsError(f"the output {quoted(out)} lies in the input {quoted(given)}", hint=hint)
    # The name that was given counts too: a folder of links holds its inputs, wherever these lie.
    places = (system.real_path(given), system.real_path(given.parent) / given.name)
    if found is not None and stat.S_ISDIR(found.st_mode) and any(_is_above(found, place) for place in places):
        raise OutputExistsError(f"the output {quoted(out)} holds the input {quoted(given)}", hint=hint)


def _check_parents(out: Path, real: Path) -> None:
    for parent in real.parents:
        found = _stat_or_none(parent)
        if found is not None:
            if not stat.S_ISDIR(found.st_mode):
                raise UsageError(f"{quoted(out)} cannot be written: {quoted(parent)} is no folder")
            return


def _is_above(folder: os.stat_result, path: Path) -> bool:
    above = (_stat_or_none(parent) for parent in path.parents)
    return any(parent is not None and os.path.samestat(folder, parent) for parent in above)


# What a folder has that this program may have written. One with nothing of the kind was named by mistake.
_OURS = re.compile(r".*\.(safetensors|bin|gguf|npz|pt|pth|ckpt)|(adapter_)?config\.json|.*index\.json")


def _check_replaceable(out: Path, names: Sequence[str]) -> None:
    if ".git" in names or not any(_OURS.fullmatch(name) for name in names):
        raise OutputExistsError(
            f"the folder {quoted(out)} holds {len(names)} entries and does not look like a model; it is not replaced",
            hint="choose another name, or remove the folder yourself",
        )


@contextmanager
def _staging(out: Path, real: Path) -> Iterator[Path]:
    """A folder of ours beside `real`, locked while in use, gone afterwards unless it was renamed."""
    made: list[Path] = []
    staging: Path | None = None
    lock: int | None = None
    try:
        try:
            _make_parents(real.parent, made)
            staging = real.parent / (_prefix(real) + _own_suffix())
            for stale in _staging_folders(real):
                if _owner_is_gone(stale):
                    _remove(stale)
            system.make_folder(staging)
            lock = system.lock_folder(staging)
        except OSError as error:
            raise machine_error(error, "write", out) from error
        yield staging
    except BaseException:
        if staging is not None:
            _remove(staging)
        for folder in reversed(made):
            try:
                system.remove_folder(folder)
            except OSError:
                break
        raise
    finally:
        if lock is not None:
            with suppress(OSError):  # nothing was written through it
                system.close(lock)
    # After a swap it is the old output that lies here, or the emptied folder of a single file.
    _remove(staging)


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = []
    while _stat_or_none(folder) is None:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            system.make_folder(path)
        except FileExistsError:  # another run was faster
            continue
        made.append(path)


def _prefix(real: Path) -> str:
    # A name may have 255 bytes; ours adds at most 60.
    return "." + os.fsencode(real.name)[:180].decode("utf-8", errors="ignore") + ".loratools-"


def _own_suffix() -> str:
    return f"{system.process_id()}-{_space()}{system.random_hex(8)}"


def _space() -> str:
    import hashlib

    return hashlib.sha256(system.process_space().encode()).hexdigest()[:8]


_SUFFIX = re.compile(r"(?P<aside>old-)?(?P<process>\d+)-(?P<space>[0-9a-f]{8})[0-9a-f]{8}")


def _staging_folders(real: Path, *, aside: bool = False) -> list[Path]:
    prefix = _prefix(real)
    try:
        names = system.names_in(real.parent)
    except OSError:
        return []
    found = []
    for name in names:
        match = _SUFFIX.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match and bool(match["aside"]) == aside:
            found.append(real.parent / name)
    return found


def _owner_is_gone(staging: Path) -> bool:
    match = _SUFFIX.search(staging.name)
    if match is None or match["space"] != _space() or system.process_lives(int(match["process"])):
        return False
    try:
        lock = system.lock_folder(staging)
    except OSError:
        return False
    if lock is not None:
        with suppress(OSError):
            system.close(lock)
    return True


def _recover(out: Path, real: Path) -> None:
    """Where a run was killed between moving the old output aside and the new one in, put the old one back."""
    for aside in _staging_folders(real, aside=True):
        if not _owner_is_gone(aside):
            continue
        if _stat_or_none(real) is not None:
            _remove(aside)
            continue
        try:
            system.rename(aside, real)
        except OSError as error:
            raise machine_error(error, "restore", out) from error


def _flush(folder: Path) -> None:
    """Bring every file of the folder, then the folder itself, to disk; what the writer has flushed costs nothing."""
    for name in system.names_in(folder):
        path = folder / name
        mode = system.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            _flush(path)
        elif stat.S_ISREG(mode):
            fd = system.open_to_flush(path)
            try:
                system.fsync(fd)
            finally:
                system.close(fd)
    system.fsync_folder(folder)


def _place_folder(out: Path, staging: Path, real: Path, overwrite: bool) -> None:
    if overwrite and _stat_or_none(real) is not None and _names_in(real):
        if system.exchange(staging, real):
            return
        aside = real.parent / (_prefix(real) + "old-" + _own_suffix())
        system.rename(real, aside)
        try:
            system.rename(staging, real)
        except BaseException:
            system.rename(aside, real)
            raise
        _remove(aside)
        return
    try:
        system.rename_over_empty(staging, real)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _beaten(out) from error
        raise


def _place_file(out: Path, staged: Path, real: Path, overwrite: bool) -> None:
    if overwrite:
        system.replace(staged, real)
        return
    try:
        # A rename would silently replace what another run has put there since it was checked.
        system.hard_link(staged, real)
    except FileExistsError as error:
        raise _beaten(out) from error
    except (OSError, AttributeError):  # no hard links on this file system
        if _stat_or_none(real) is not None:
            raise _beaten(out) from None
        system.replace(staged, real)


def _beaten(out: Path) -> OutputExistsError:
    return OutputExistsError(f"{quoted(out)} was written by another run meanwhile", hint=_OVERWRITE)


def _remove(folder: Path) -> None:
    """Remove a folder of ours as far as possible; twice, as one failure may be passing.

    What stays is removed by the next run: the output matters more than an error here.
    """
    for _ in range(2):
        try:
            names = system.names_in(folder)
        except FileNotFoundError:
            return
        except OSError:
            continue
        for name in names:
            path = folder / name
            try:
                if stat.S_ISDIR(system.lstat(path).st_mode):
                    _remove(path)
                else:
                    system.remove_file(path)
            except OSError:
                continue
        try:
            system.remove_folder(folder)
            return
        except OSError:
            continue
