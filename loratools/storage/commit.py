"""An output appears under its name complete, or not at all, and replaces nothing but what this program wrote.

Everything is written into a hidden folder beside the output, `.NAME.loratools-PID-HEX`, flushed to disk, then renamed.
The folder is removed when the block that fills it fails. One that a killed process left is recognised by its owner
being gone: the process id in its name is free, in our own space of process ids, and nobody holds its lock. Each of the
two can be wrong alone (containers share folders but not process ids; some network file systems grant every lock).

A folder that is replaced keeps what other hands put there: it gets a second name in the new folder before the two are
exchanged, and the old names are removed afterwards, of our own files and of what is surely in the new folder too.
An empty folder that cannot be renamed, being a mount point or in a folder that may not be written to, is filled from
a hidden folder inside it, index and record last: there, and only there, a killed run can leave some of the files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import LoraToolsError, MachineError, OutputExistsError, UsageError
from loratools.storage import system
from loratools.storage.files import is_without_room, machine_error, quoted
from loratools.storage.held_inputs import hold_no, require_unchanged
from loratools.storage.ownership import (
    RECORD,
    entries_below,
    foreign_entries,
    is_marked,
    owned_files,
    write_record,
)

_OVERWRITE = "choose another name, or replace what loratools wrote there with --overwrite"
_NOT_OURS = "choose another name, or remove the {} yourself"


@dataclass(frozen=True)
class Replacement:
    """What `--overwrite` does to an output that is there: files that are replaced, and entries that stay."""

    files: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def check_output(out: Path, *, overwrite: bool, inputs: Sequence[Path], names: Iterable[str] = ()) -> Replacement:
    """Check, before any work, that the output may be written. An empty folder counts as no output.

    Args:
        out: the file or folder to write.
        overwrite: whether files that loratools wrote may be replaced.
        inputs: what the output must not be, hold or lie in.
        names: the files that will be in the folder, where they are known.

    Returns:
        What is going to be replaced, and what stays beside it.

    Raises:
        OutputExistsError: it is there and `overwrite` is False, or it is, holds or lies in one of the inputs, or what
            other hands wrote would have to go.
        UsageError: it is no file or folder, or cannot be one.
    """
    real = _real(out)
    status = _stat_or_none(real)
    for source in inputs:
        _check_apart(out, real, status, source)
    hold_no(real)
    if status is None:
        _check_parents(out, real)
        return Replacement()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UsageError(f"{quoted(out)} is a device, FIFO or socket, and is not replaced", hint="choose another name")
    if stat.S_ISREG(status.st_mode):
        if not overwrite:
            raise OutputExistsError(f"{quoted(out)} exists", hint=_OVERWRITE)
        if not is_marked(real):
            raise OutputExistsError(
                f"{quoted(out)} was not written by loratools and is not replaced", hint=_NOT_OURS.format("file")
            )
        return Replacement(files=(out.name,))
    if not _content(real):
        return Replacement()
    if not overwrite:
        raise OutputExistsError(f"the folder {quoted(out)} exists and is not empty", hint=_OVERWRITE)
    return _replacement(out, real, names)


def _content(real: Path) -> list[str]:
    """Names in the folder, without what a run that fills it in place has prepared there."""
    prepared = {path.name for path in _staging_folders(real, inside=True)}
    return [name for name in _names_in(real) if name not in prepared]


def _replacement(out: Path, real: Path, names: Iterable[str]) -> Replacement:
    """What goes and what stays when `names` are put into a folder that is not empty."""
    try:
        owned = owned_files(real)
        if owned is None:
            raise OutputExistsError(
                f"the folder {quoted(out)} has no record of what loratools wrote ('{RECORD}'), and nothing in it is "
                "replaced",
                hint=_NOT_OURS.format("folder"),
            )
        foreign = foreign_entries(real, owned)
        mounted = [n for n, is_folder in entries_below(real) if is_folder and system.is_mount_point(real / n)]
    except OSError as error:
        raise machine_error(error, "look into", out) from error
    if _stays_in_place(real) or mounted:
        raise UsageError(
            f"the folder {quoted(out)} cannot be replaced: it is or holds a mount point, or the folder that it is in "
            "may not be written to",
            hint="choose another name, or one inside of it",
        )
    if collisions := sorted({entry for name in names for entry in foreign if _collide(name, entry)}):
        raise OutputExistsError(
            f"the folder {quoted(out)} holds {len(collisions)} entries that loratools did not write, or that were "
            "changed since, where the output has files of that name",
            details=collisions,
            hint="move them elsewhere, or choose another name",
        )
    return Replacement(tuple(sorted(owned)), tuple(foreign))


def _collide(name: str, entry: str) -> bool:
    """Whether a new file and an entry that stays cannot both be: one is the other, or a file where a folder must be."""
    existing = entry.rstrip("/")
    if entry.endswith("/"):
        return name == existing or name.startswith(entry)
    return name == existing or name.startswith(f"{existing}/") or existing.startswith(f"{name}/")


def _stays_in_place(real: Path) -> bool:
    return system.is_mount_point(real) or not system.may_write(real.parent)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends in order, it becomes `out` in one step, flushed to disk.

    On any exception it is removed and `out` is as before. With `overwrite` all files that loratools wrote there are
    replaced, so that nothing stale stays behind, and everything else is in the new folder under its old name. What
    killed runs left beside `out` is removed. A record of the files is added (`ownership.write_record`).

    Raises:
        OutputExistsError: see `check_output`; also when another run has written `out` meanwhile, or when something
            that stays has the name of a new file.
        MachineError: the disk is full, there is no permission, or the hidden folder was removed by someone else.
    """
    real = _real(out)
    _recover(out, real)
    check_output(out, overwrite=overwrite, inputs=inputs)
    status = _stat_or_none(real)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{quoted(out)} is a file, and a folder is to be written", hint="choose another name")
    inside = status is not None and _stays_in_place(real)
    with _staging(out, real, inside=inside) as staging:
        try:
            yield staging.path
        except MachineError as error:
            if _is_missing_in(staging.path, error.__cause__):
                raise _removed(out) from error
            raise
        try:
            staging.require(out)
            write_record(staging.path)
            _flush(staging.path)
            require_unchanged()
            if inside:
                _fill_in_place(out, staging.path, real)
            else:
                if status is not None:
                    system.change_mode(staging.path, stat.S_IMODE(status.st_mode))
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
    with _staged_file(out, overwrite=overwrite) as staged:
        yield staged
        require_unchanged()


@contextmanager
def rewritten_file(path: Path) -> Iterator[Path]:
    """The same for a file inside of an output that is being prepared: one that is there is replaced, whoever wrote it.

    Raises:
        MachineError: the disk is full, or there is no permission.
    """
    with _staged_file(path, overwrite=True) as staged:
        yield staged


@contextmanager
def _staged_file(out: Path, *, overwrite: bool) -> Iterator[Path]:
    real = _real(out)
    status = _stat_or_none(real)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{quoted(out)} is a folder, and a file is to be written", hint="add the name of the file")
    with _staging(out, real) as staging:
        staged = staging.path / real.name
        yield staged
        try:
            staging.require(out, real.name)
            _flush(staging.path)
            if status is not None:
                system.change_mode(staged, stat.S_IMODE(status.st_mode))
            _place_file(out, staged, real, overwrite)
            system.fsync_folder(real.parent)
        except OSError as error:
            raise machine_error(error, "write", out) from error


def require_files(staging: Path, out: Path, names: Iterable[str]) -> None:
    """Check that all of `names` are still in the folder that is prepared for `out`.

    Raises:
        MachineError: someone else has removed one.
    """
    if any(_stat_or_none(staging / name) is None for name in names):
        raise _removed(out)


def _is_missing_in(staging: Path, error: BaseException | None) -> bool:
    """Whether a file of the prepared folder could not be opened because someone else has removed it."""
    return isinstance(error, FileNotFoundError) and Path(str(error.filename)).is_relative_to(staging)


def _removed(out: Path) -> MachineError:
    return MachineError(
        f"what was prepared for {quoted(out)} was removed meanwhile; nothing was written",
        hint="keep whatever cleans up temporary files away from this folder, and start again",
    )


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder on the disk of `out`, which is removed when the block ends, or by the next run.

    Raises:
        MachineError: there is no permission.
    """
    with _staging(out, _real(out)) as staging:
        yield staging.path


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


def _check_apart(out: Path, real: Path, out_status: os.stat_result | None, source: Path) -> None:
    """Refuse an output that is, holds or lies in an input. Compared by inode: links, mounts and case cannot hide it."""
    source_status = _stat_or_none(source)
    if source_status is None:
        return
    hint = "choose a place outside of the inputs"
    if out_status is not None and os.path.samestat(out_status, source_status):
        raise OutputExistsError(f"the output {quoted(out)} is also an input", hint=hint)
    if stat.S_ISDIR(source_status.st_mode) and _is_above(source_status, real):
        raise OutputExistsError(f"the output {quoted(out)} lies in the input {quoted(source)}", hint=hint)
    # The name that was given counts too: a folder of links holds its inputs, wherever these lie.
    places = (system.real_path(source), system.real_path(source.parent) / source.name)
    if (
        out_status is not None
        and stat.S_ISDIR(out_status.st_mode)
        and any(_is_above(out_status, place) for place in places)
    ):
        raise OutputExistsError(f"the output {quoted(out)} holds the input {quoted(source)}", hint=hint)


def _check_parents(out: Path, real: Path) -> None:
    for parent in real.parents:
        status = _stat_or_none(parent)
        if status is not None:
            if not stat.S_ISDIR(status.st_mode):
                raise UsageError(f"{quoted(out)} cannot be written: {quoted(parent)} is no folder")
            return


def _is_above(folder: os.stat_result, path: Path) -> bool:
    above = (_stat_or_none(parent) for parent in path.parents)
    return any(parent is not None and os.path.samestat(folder, parent) for parent in above)


class _Staging:
    """A hidden folder being filled, held by a lock; `replaced` once the old output lies under its name."""

    def __init__(self, path: Path, real: Path, lock: int | None) -> None:
        self.path = path
        self.real = real
        self.lock = lock
        self.created = system.stat(path)
        self.replaced: frozenset[str] | None = None

    def require(self, out: Path, *names: str) -> None:
        """Raise MachineError where someone else has removed the folder, or one of `names` from it."""
        status = _stat_or_none(self.path)
        if status is None or not os.path.samestat(status, self.created):
            raise _removed(out)
        require_files(self.path, out, names)

    def remove(self) -> None:
        """Remove what was prepared; of an old output under this name, nothing that is not ours or in the new one."""
        if self.replaced is None:
            _remove(self.path)
        else:
            _remove_replaced(self.path, self.real, self.replaced)


@contextmanager
def _staging(out: Path, real: Path, *, inside: bool = False) -> Iterator[_Staging]:
    """A folder of ours beside `real` or inside of it, locked while in use, gone afterwards unless it was renamed."""
    created: list[Path] = []
    staging: _Staging | None = None
    try:
        try:
            _make_parents(real.parent, created)
            path = (real if inside else real.parent) / (_prefix(real) + _own_suffix())
            for stale in [*_staging_folders(real), *_staging_folders(real, inside=True)]:
                if _owner_is_gone(stale):
                    _remove(stale)
            system.make_folder(path)
            hold_no(path)
            try:
                staging = _Staging(path, real, system.lock_folder(path))
            except BaseException:
                _remove(path)
                raise
        except OSError as error:
            raise machine_error(error, "write", out) from error
        try:
            yield staging
        except LoraToolsError as error:
            if not isinstance(error, MachineError | UsageError):
                staging.require(out)
            raise _about_output(error, staging.path, out, real) from error.__cause__
        except OSError as error:
            # A small file beside the weights, which is written without a word of ours about what may go wrong.
            staging.require(out)
            if not is_without_room(error):
                raise
            path = Path(str(error.filename)) if error.filename is not None else out
            raise _about_output(machine_error(error, "write", path), staging.path, out, real) from error
        except Exception:
            # What is missing there may well be why the block failed: that is the error, and no bug of ours.
            staging.require(out)
            raise
    except BaseException:
        if staging is not None:
            staging.remove()
        for folder in reversed(created):
            try:
                system.remove_folder(folder)
            except OSError:
                break
        raise
    finally:
        if staging is not None and staging.lock is not None:
            with suppress(OSError):  # nothing was written through it
                system.close(staging.lock)
    # After a swap it is the old output that lies here, or the emptied folder of a single file.
    staging.remove()


def _about_output(error: LoraToolsError, staging: Path, out: Path, real: Path) -> LoraToolsError:
    """The error with the names that the files will have, in place of those while they are prepared."""

    def renamed(text: str) -> str:
        return text.replace(str(staging / real.name), str(out)).replace(str(staging), str(out))

    texts = (error.message, error.hint or "", *error.details)
    if all(renamed(text) == text for text in texts):
        return error
    hint = None if error.hint is None else renamed(error.hint)
    return type(error)(renamed(error.message), hint=hint, details=[renamed(line) for line in error.details])


def _make_parents(folder: Path, created: list[Path]) -> None:
    missing = []
    while _stat_or_none(folder) is None:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            system.make_folder(path)
        except FileExistsError:  # another run was faster
            continue
        created.append(path)


def _prefix(real: Path) -> str:
    # A name may have 255 bytes; ours adds at most 60.
    return "." + os.fsencode(real.name)[:180].decode("utf-8", errors="ignore") + ".loratools-"


def _own_suffix() -> str:
    return f"{system.process_id()}-{_space()}{system.random_hex(8)}"


def _space() -> str:
    import hashlib

    return hashlib.sha256(system.process_space().encode()).hexdigest()[:8]


_SUFFIX = re.compile(r"(?P<aside>old-)?(?P<process>\d+)-(?P<space>[0-9a-f]{8})[0-9a-f]{8}")


def _staging_folders(real: Path, *, aside: bool = False, inside: bool = False) -> list[Path]:
    prefix = _prefix(real)
    folder = real if inside else real.parent
    try:
        names = system.names_in(folder)
    except OSError:
        return []
    paths = []
    for name in names:
        match = _SUFFIX.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match and bool(match["aside"]) == aside:
            paths.append(folder / name)
    return paths


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


def _place_folder(out: Path, staging: _Staging, real: Path, overwrite: bool) -> None:
    if overwrite and _stat_or_none(real) is not None and _names_in(real):
        # Looked at again: what was written there since the beginning is kept as well.
        names = [name for name, is_folder in entries_below(staging.path) if not is_folder]
        replacement = _replacement(out, real, [name for name in names if name != RECORD])
        owned = frozenset(replacement.files)
        _keep(out, replacement.kept, real, staging.path)
        if system.exchange(staging.path, real):
            staging.replaced = owned
            return
        aside = real.parent / (_prefix(real) + "old-" + _own_suffix())
        system.rename(real, aside)
        try:
            system.rename(staging.path, real)
        except BaseException:
            system.rename(aside, real)
            raise
        _remove_replaced(aside, real, owned)
        return
    try:
        system.rename_over_empty(staging.path, real)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _beaten(out) from error
        raise


def _keep(out: Path, entries: Sequence[str], old: Path, new: Path) -> None:
    """Give everything that stays a second name in the new folder; folders are made anew, with the same attributes."""
    try:
        for entry in entries:
            name = entry.rstrip("/")
            for parent in reversed(Path(name).parents[:-1]):
                _make_like(old / parent, new / parent)
            if not entry.endswith("/"):
                system.hard_link_unfollowed(old / name, new / name)
                continue
            _make_like(old / name, new / name)
            folders = [name]
            for inner, is_folder in entries_below(old / name, entry):
                if is_folder:
                    _make_like(old / inner, new / inner)
                    folders.append(inner)
                else:
                    system.hard_link_unfollowed(old / inner, new / inner)
            for folder in reversed(folders):  # last, as a folder's time is that of its last new name
                system.copy_attributes(old / folder, new / folder)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in system.UNSUPPORTED_LINKS:
            raise
        raise OutputExistsError(
            f"the folder {quoted(out)} holds {len(entries)} entries that loratools did not write, and this file system "
            "cannot keep them while the rest is replaced",
            details=list(entries),
            hint="move them elsewhere, or choose another name",
        ) from error


def _make_like(old: Path, new: Path) -> None:
    with suppress(FileExistsError):
        system.make_folder(new)
        system.change_mode(new, stat.S_IMODE(system.stat(old).st_mode) | stat.S_IRWXU)


def _remove_replaced(old: Path, real: Path, owned: frozenset[str]) -> None:
    """Remove the names of an old output: of files in `owned`, and of what is in the new one too.

    What somebody put there in the last moment is moved into the new output; what cannot be is left where it is.
    """
    for _ in range(2):  # one failure may be passing
        try:
            entries = list(entries_below(old))
        except OSError:
            continue
        for name, is_folder in sorted(entries, reverse=True):  # the content of a folder before the folder
            path = old / name
            with suppress(OSError):
                if is_folder:
                    system.remove_folder(path)
                elif name in owned or _is_same_entry(path, real / name):
                    system.remove_file(path)
                elif not system.exists(real / name):
                    _make_parents((real / name).parent, [])
                    system.rename(path, real / name)
        with suppress(OSError):
            system.remove_folder(old)
            return
    if system.exists(old):
        with suppress(OSError):  # under a name that no later run takes for its own
            system.rename(old, old.with_name(f"{real.name}.kept-{system.random_hex(8)}"))


def _is_same_entry(first: Path, second: Path) -> bool:
    try:
        return os.path.samestat(system.lstat(first), system.lstat(second))
    except OSError:
        return False


def _fill_in_place(out: Path, staging: Path, real: Path) -> None:
    """Move what was prepared inside of an empty folder to its place there, index and record last."""
    if _content(real):
        raise _beaten(out)
    names = sorted(system.names_in(staging), key=lambda name: (name == RECORD, name.endswith("index.json"), name))
    moved: list[str] = []
    try:
        for name in names:
            system.rename(staging / name, real / name)
            moved.append(name)
        system.fsync_folder(real)
    except BaseException:
        for name in reversed(moved):
            with suppress(OSError):
                system.rename(real / name, staging / name)
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
