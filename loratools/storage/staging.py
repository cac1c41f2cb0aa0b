"""The hidden folder in which an output is prepared: made and locked, then removed, or kept to be resumed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import ChangedInputError, LoraToolsError, MachineError, UsageError
from loratools.storage import system
from loratools.storage.files import is_without_room, machine_error, quoted
from loratools.storage.held_inputs import hold_no
from loratools.storage.output_paths import stat_or_none
from loratools.storage.ownership import entries_below
from loratools.storage.removal import discard, make_parents, remove, remove_replaced
from loratools.storage.resumption import AbandonedRun, Resumable, run_to_resume
from loratools.storage.run_journal import JOURNAL, RunHead, RunJournal, read_journal
from loratools.storage.staging_names import name_prefix, name_suffix, owner_is_gone, process_space, staging_folders


class Staging:
    """A hidden folder being filled, held by a lock.

    Attributes:
        path: The folder.
        journal: What is written down of the run, where it is one for an output and not for a file inside of one.
        resumed: Whether it is that of a killed run, whose finished work is in it.
        keeps_work: Whether finished work stays there for another run when this one is ended.
        sha256_of: Digests of files in it that were hashed while they were written, by name.
        sampled: Names of files that the record of the output has no hash of all of, being large.
        replaced: The files of ours in the old output, once that lies under the name of the folder.
    """

    def __init__(self, path: Path, real: Path) -> None:
        self.path = path
        self.journal: RunJournal | None = None
        self.resumed = False
        self.keeps_work = False
        self.sha256_of: dict[str, str] = {}
        self.sampled: frozenset[str] = frozenset()
        self.replaced: frozenset[str] | None = None
        self._real = real
        self._lock = system.lock_folder(path)
        self._created = system.stat(path)

    def require(self, out: Path, *names: str) -> None:
        """Raise MachineError where someone else has removed the folder, or one of `names` from it."""
        status = stat_or_none(self.path)
        if status is None or not os.path.samestat(status, self._created):
            raise self.removed(out)
        if any(stat_or_none(self.path / name) is None for name in names):
            raise self.removed(out)

    def removed(self, out: Path) -> MachineError:
        """The error that someone else has removed the folder or a part of it: what is left is of no use."""
        self.keeps_work = False
        return removed_error(out)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove what a killed run left beside the files of these names, and its journal.

        Raises:
            MachineError: There is no permission.
        """
        expected = {JOURNAL, *names}
        try:
            for name in [
                name for name, is_folder in entries_below(self.path) if not is_folder and name not in expected
            ]:
                system.remove_file(self.path / name)
        except OSError as error:
            raise machine_error(error, "remove what a killed run left in", self.path) from error

    def end_journal(self) -> None:
        """Take the journal out of the folder, whose content is complete. Locks stay."""
        if self.journal is not None:
            self.journal.close()  # an open file cannot be removed everywhere
            system.remove_file(self.path / JOURNAL)
            self.keeps_work = False

    def is_kept_after(self, error: BaseException) -> bool:
        """Whether the error leaves finished work that another run may go on with: a signal, or a failure of a disk."""
        passing = not isinstance(error, Exception) or isinstance(error, MachineError)
        changed = isinstance(error, ChangedInputError)
        has_finished_units = self.journal is not None and self.journal.has_units
        return self.keeps_work and has_finished_units and passing and not changed and system.exists(self.path / JOURNAL)

    def remove(self) -> None:
        """Remove what was prepared; of an old output under this name, nothing that is not ours or in the new one."""
        if self.journal is not None:
            self.journal.close()
        if self.replaced is None:
            remove(self.path)
        else:
            remove_replaced(self.path, self._real, self.replaced)

    def release(self) -> None:
        """Let go of the locks."""
        if self.journal is not None:
            self.journal.close()
        if self._lock is not None:
            with suppress(OSError):  # nothing was written through it
                system.close(self._lock)


@contextmanager
def staging(
    out: Path, real: Path, *, inside: bool = False, in_output: bool = False, resumable: Resumable | None = None
) -> Iterator[Staging]:
    """A folder of ours beside `real` or inside of it, locked while in use, gone afterwards unless it was renamed.

    What a killed run has left for this output is removed: at once where no run could go on with it, otherwise when the
    block has ended in order.

    Args:
        out: The output, as it was given.
        real: Its real path.
        inside: Make the folder inside of the output, an empty folder that stays.
        in_output: It is for one file inside of an output that has a folder of its own.
        resumable: What the run is to do, where finished work may be kept for another run.
    """
    created: list[Path] = []
    prepared: Staging | None = None
    try:
        try:
            make_parents(real.parent, created)
            resumed = None
            if resumable is not None and resumable.resume and resumable.plan is not None:
                resumed = run_to_resume(out, real, resumable.plan)
            superseded = _remove_stale(real, but=resumed.path if resumed is not None else None)
            if resumed is not None:
                prepared = _reopened(resumed, out, real)
            else:
                prepared = _created(out, real, inside=inside, in_output=in_output, resumable=resumable)
        except OSError as error:
            raise machine_error(error, "write", out) from error
        try:
            yield prepared
        except LoraToolsError as error:
            if not isinstance(error, MachineError | UsageError):
                prepared.require(out)
            raise _about_output(error, prepared.path, out, real) from error.__cause__
        except OSError as error:
            # A small file beside the weights, which is written without a word of ours about what may go wrong.
            prepared.require(out)
            if not is_without_room(error):
                raise
            path = Path(str(error.filename)) if error.filename is not None else out
            raise _about_output(machine_error(error, "write", path), prepared.path, out, real) from error
        except Exception:
            # What is missing there may well be why the block failed: that is the error, and no bug of ours.
            prepared.require(out)
            raise
    except BaseException as error:
        if prepared is not None and prepared.is_kept_after(error):
            prepared.release()
            raise _with_remedy(error, real) from error.__cause__
        if prepared is not None:
            prepared.remove()
            prepared.release()
        for folder in reversed(created):
            try:
                system.remove_folder(folder)
            except OSError:
                break
        raise
    # After a swap it is the old output that lies here, or the emptied folder of a single file.
    prepared.remove()
    prepared.release()
    for folder in superseded:
        discard(folder, real)


def _remove_stale(real: Path, *, but: Path | None) -> list[Path]:
    """Remove what dead runs left for an output, `but` one; those with work to go on with stay, and are returned."""
    with_work = []
    for folder in (*staging_folders(real), *staging_folders(real, inside=True)):
        if folder == but or not owner_is_gone(folder):
            continue
        recorded = read_journal(folder)
        if recorded is not None and recorded.units:
            with_work.append(folder)
        else:
            discard(folder, real)
    return with_work


def _created(out: Path, real: Path, *, inside: bool, in_output: bool, resumable: Resumable | None) -> Staging:
    path = (real if inside else real.parent) / (name_prefix(real) + name_suffix())
    system.make_folder(path)
    hold_no(path)
    prepared: Staging | None = None
    try:
        prepared = Staging(path, real)
        if not in_output:
            head = RunHead(
                real.name, inside, system.process_id(), process_space(), platform.node(), round(time.time(), 3)
            )
            prepared.journal = RunJournal.create(path, head)
        prepared.keeps_work = resumable is not None
        if prepared.journal is not None and resumable is not None and resumable.plan is not None:
            prepared.journal.note_plan(resumable.plan.to_dict())
    except BaseException as error:
        remove(path)
        if prepared is not None:
            prepared.release()
        if isinstance(error, MachineError):
            raise _about_output(error, path, out, real) from error.__cause__
        raise
    return prepared


def _reopened(run: AbandonedRun, out: Path, real: Path) -> Staging:
    hold_no(run.path)
    try:
        prepared = Staging(run.path, real)
        prepared.journal = RunJournal.reopened(run.path, run.recorded)
    except BlockingIOError as error:
        raise MachineError(f"{quoted(out)} is being resumed by another run", hint="wait until it is done") from error
    prepared.keeps_work = prepared.resumed = True
    return prepared


def _with_remedy(error: BaseException, real: Path) -> BaseException:
    """The error, saying that finished work is kept, and how to go on with it."""
    text = f"what is done is kept: the same command with --resume goes on, 'loratools clean {real.parent}' removes it"
    if isinstance(error, LoraToolsError):
        hint = f"{error.hint}; {text}" if error.hint else text
        return type(error)(error.message, hint=hint, details=error.details)
    # Does what `add_note` does, which Python 3.10 lacks.
    error.__notes__ = [*getattr(error, "__notes__", []), text]  # type: ignore[attr-defined]
    return error


def _about_output(error: LoraToolsError, staging: Path, out: Path, real: Path) -> LoraToolsError:
    """The error with the names that the files will have, in place of those while they are prepared."""

    def renamed(text: str) -> str:
        return text.replace(str(staging / real.name), str(out)).replace(str(staging), str(out))

    texts = (error.message, error.hint or "", *error.details)
    if all(renamed(text) == text for text in texts):
        return error
    hint = None if error.hint is None else renamed(error.hint)
    return type(error)(renamed(error.message), hint=hint, details=[renamed(line) for line in error.details])


def require_files(staging: Path, out: Path, names: Iterable[str]) -> None:
    """Check that all of `names` are still in the folder that is prepared for `out`.

    Raises:
        MachineError: Someone else has removed one.
    """
    if any(stat_or_none(staging / name) is None for name in names):
        raise removed_error(out)


def removed_error(out: Path) -> MachineError:
    """The error of a hidden folder, or of a file in it, that was removed by someone else."""
    return MachineError(
        f"what was prepared for {quoted(out)} was removed meanwhile; nothing was written",
        hint="keep whatever cleans up temporary files away from this folder, and start again",
    )
