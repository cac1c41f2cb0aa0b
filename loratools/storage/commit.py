"""An output appears under its name complete, or not at all, and replaces nothing but what this program wrote.

Everything is written into a hidden folder beside the output (`staging`), flushed to disk, then renamed.

A folder that is replaced keeps what other hands put there: it gets a second name in the new folder before the two are
exchanged, and the old names are removed afterwards, of our own files and of what is surely in the new folder too.
An empty folder that cannot be renamed, being a mount point or in a folder that may not be written to, is filled from
a hidden folder inside it, index and record last: there, and only there, a killed run can leave some of the files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import MachineError, OutputExistsError, UsageError
from loratools.storage import system
from loratools.storage.files import machine_error, quoted
from loratools.storage.held_inputs import hold_no, require_unchanged
from loratools.storage.output_paths import names_in, real_path_of, stat_or_none
from loratools.storage.ownership import (
    RECORD,
    entries_below,
    foreign_entries,
    is_marked,
    owned_files,
    write_record,
)
from loratools.storage.removal import discard, remove_replaced
from loratools.storage.resumption import Resumable
from loratools.storage.run_journal import JOURNAL
from loratools.storage.staging import Staging, staging
from loratools.storage.staging_names import name_prefix, name_suffix, owner_is_gone, staging_folders

_OVERWRITE = "choose another name, or replace what loratools wrote there with --overwrite"
_NOT_OURS = "choose another name, or remove the {} yourself"


@dataclass(frozen=True)
class Replacement:
    """What `--overwrite` does to an output that is there: files that are replaced, and entries that stay."""

    files: tuple[str, ...] = ()
    preserved: tuple[str, ...] = ()


def check_output(out: Path, *, overwrite: bool, inputs: Sequence[Path], names: Iterable[str] = ()) -> Replacement:
    """Check, before any work, that the output may be written. An empty folder counts as no output.

    Args:
        out: The file or folder to write.
        overwrite: Whether files that loratools wrote may be replaced.
        inputs: What the output must not be, hold or lie in.
        names: The files that will be in the folder, where they are known.

    Returns:
        What is going to be replaced, and what stays beside it.

    Raises:
        OutputExistsError: It is there and `overwrite` is False, or it is, holds or lies in one of the inputs, or what
            other hands wrote would have to go.
        UsageError: It is no file or folder, or cannot be one.
    """
    real = real_path_of(out)
    status = stat_or_none(real)
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
    prepared = {path.name for path in staging_folders(real, inside=True)}
    return [name for name in names_in(real) if name not in prepared]


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

    Like `prepared_folder`, for a run that cannot be resumed.
    """
    with prepared_folder(out, overwrite=overwrite, inputs=inputs) as prepared:
        yield prepared.path


@contextmanager
def prepared_folder(
    out: Path, *, overwrite: bool, inputs: Sequence[Path], resumable: Resumable | None = None
) -> Iterator[Staging]:
    """Give a folder to fill; when the block ends in order, it becomes `out` in one step, flushed to disk.

    It is empty, or has what a killed run of the same plan left, where `resumable` goes on with that. On any exception
    it is removed and `out` is as before; of a run that can be resumed, finished work stays after a signal or a failure
    of the disk. With `overwrite` all files that loratools wrote there are
    replaced, so that nothing stale stays behind, and everything else is in the new folder under its old name. What
    killed runs left beside `out` is removed. A record of the files is added (`ownership.write_record`).

    Raises:
        OutputExistsError: See `check_output`; also when another run has written `out` meanwhile, or when something that
            stays has the name of a new file.
        MachineError: The disk is full, there is no permission, or the hidden folder was removed by someone else.
    """
    real = real_path_of(out)
    _recover(out, real)
    check_output(out, overwrite=overwrite, inputs=inputs)
    status = stat_or_none(real)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{quoted(out)} is a file, and a folder is to be written", hint="choose another name")
    inside = status is not None and _stays_in_place(real)
    with staging(out, real, inside=inside, resumable=resumable) as prepared:
        try:
            yield prepared
        except MachineError as error:
            if _is_missing_in(prepared.path, error.__cause__):
                raise prepared.removed(out) from error
            raise
        try:
            prepared.require(out)
            write_record(prepared.path, sha256_of=prepared.sha256_of, sampled=prepared.sampled)
            _flush(prepared.path)
            require_unchanged()
            if inside:
                _fill_in_place(out, prepared, real)
            else:
                if status is not None:
                    system.change_mode(prepared.path, stat.S_IMODE(status.st_mode))
                _place_folder(out, prepared, real, overwrite)
                system.fsync_folder(real.parent)
        except OSError as error:
            raise machine_error(error, "write", out) from error


@contextmanager
def staged_file(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Path]:
    """Give the path of a file to create; when the block ends in order, it becomes `out` in one step, flushed to disk.

    As `prepared_file`, of a run that cannot be resumed.
    """
    with prepared_file(out, overwrite=overwrite, inputs=inputs) as (_, staged):
        yield staged


@contextmanager
def prepared_file(
    out: Path, *, overwrite: bool, inputs: Sequence[Path], resumable: Resumable | None = None
) -> Iterator[tuple[Staging, Path]]:
    """Give a folder, and the path of a file in it to create; when the block ends in order, the file becomes `out`.

    On any exception it is removed and `out` is as before; of a run that can be resumed, finished work stays after a
    signal or a failure of the disk. A link is followed, and stays.

    Raises:
        OutputExistsError: See `check_output`; also when another run has written `out` meanwhile.
        MachineError: The disk is full, or there is no permission.
    """
    check_output(out, overwrite=overwrite, inputs=inputs)
    with _prepared_file(out, overwrite=overwrite, resumable=resumable) as (prepared, staged):
        yield prepared, staged
        require_unchanged()


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Like `staged_file`, for a file that may be replaced whatever program wrote it, which the caller has checked.

    Raises:
        MachineError: The disk is full, or there is no permission.
    """
    with _prepared_file(path, overwrite=True) as (_, staged):
        yield staged


@contextmanager
def rewritten_file(path: Path) -> Iterator[Path]:
    """Like `staged_file`, for a file inside an output that is being prepared; an existing file is replaced.

    Raises:
        MachineError: The disk is full, or there is no permission.
    """
    with _prepared_file(path, overwrite=True, in_output=True) as (_, staged):
        yield staged


@contextmanager
def _prepared_file(
    out: Path, *, overwrite: bool, in_output: bool = False, resumable: Resumable | None = None
) -> Iterator[tuple[Staging, Path]]:
    real = real_path_of(out)
    status = stat_or_none(real)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{quoted(out)} is a folder, and a file is to be written", hint="add the name of the file")
    with staging(out, real, in_output=in_output, resumable=resumable) as prepared:
        staged = prepared.path / real.name
        yield prepared, staged
        try:
            prepared.require(out, real.name)
            _flush(prepared.path)
            if status is not None:
                system.change_mode(staged, stat.S_IMODE(status.st_mode))
            prepared.keeps_work = False  # from here on the file may be the output
            _place_file(out, staged, real, overwrite)
            system.fsync_folder(real.parent)
        except OSError as error:
            raise machine_error(error, "write", out) from error


def _is_missing_in(staging: Path, error: BaseException | None) -> bool:
    """Whether a file of the prepared folder could not be opened because someone else has removed it."""
    return isinstance(error, FileNotFoundError) and Path(str(error.filename)).is_relative_to(staging)


@contextmanager
def scratch_folder(out: Path, *, resumable: Resumable | None = None) -> Iterator[Staging]:
    """Give a folder on the disk of `out`, which is removed when the block ends, or by the next run.

    It is empty, or has what a killed run of the same plan left, where `resumable` goes on with that.

    Raises:
        MachineError: There is no permission.
    """
    with staging(out, real_path_of(out), resumable=resumable) as prepared:
        yield prepared


def _check_apart(out: Path, real: Path, out_status: os.stat_result | None, source: Path) -> None:
    """Refuse an output that is, holds or lies in an input. Compared by inode: links, mounts and case cannot hide it."""
    source_status = stat_or_none(source)
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
        status = stat_or_none(parent)
        if status is not None:
            if not stat.S_ISDIR(status.st_mode):
                raise UsageError(f"{quoted(out)} cannot be written: {quoted(parent)} is no folder")
            return


def _is_above(folder: os.stat_result, path: Path) -> bool:
    above = (stat_or_none(parent) for parent in path.parents)
    return any(parent is not None and os.path.samestat(folder, parent) for parent in above)


def _recover(out: Path, real: Path) -> None:
    """Where a run was killed between moving the old output aside and the new one in, put the old one back."""
    for aside in staging_folders(real, aside=True):
        if not owner_is_gone(aside):
            continue
        if stat_or_none(real) is not None:
            discard(aside, real)
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
        elif stat.S_ISREG(mode) and name != JOURNAL:
            fd = system.open_to_flush(path)
            try:
                system.fsync(fd)
            finally:
                system.close(fd)
    system.fsync_folder(folder)


def _place_folder(out: Path, prepared: Staging, real: Path, overwrite: bool) -> None:
    if overwrite and stat_or_none(real) is not None and names_in(real):
        # Looked at again: what was written there since the beginning is kept as well.
        names = [name for name, is_folder in entries_below(prepared.path) if not is_folder]
        replacement = _replacement(out, real, [name for name in names if name not in (RECORD, JOURNAL)])
        owned = frozenset(replacement.files)
        _keep(out, replacement.preserved, real, prepared.path)
        prepared.end_journal()
        if system.exchange(prepared.path, real):
            prepared.replaced = owned
            return
        aside = real.parent / (name_prefix(real) + "old-" + name_suffix())
        system.rename(real, aside)
        try:
            system.rename(prepared.path, real)
        except BaseException:
            system.rename(aside, real)
            raise
        remove_replaced(aside, real, owned)
        return
    prepared.end_journal()
    try:
        system.rename_over_empty(prepared.path, real)
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


def _fill_in_place(out: Path, prepared: Staging, real: Path) -> None:
    """Move what was prepared inside of an empty folder to its place there, index and record last."""
    if _content(real):
        raise _beaten(out)
    names = sorted(
        (name for name in system.names_in(prepared.path) if name != JOURNAL),
        key=lambda name: (name == RECORD, name.endswith("index.json"), name),
    )
    moved: list[str] = []
    try:
        for name in names:
            system.rename(prepared.path / name, real / name)
            moved.append(name)
        system.fsync_folder(real)
    except BaseException:
        for name in reversed(moved):
            with suppress(OSError):
                system.rename(real / name, prepared.path / name)
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
        if stat_or_none(real) is not None:
            raise _beaten(out) from None
        system.replace(staged, real)


def _beaten(out: Path) -> OutputExistsError:
    return OutputExistsError(f"{quoted(out)} was written by another run meanwhile", hint=_OVERWRITE)
