"""clean: remove the hidden folders that killed runs left beside outputs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from loratools.arguments import checked
from loratools.errors import MachineError, UsageError
from loratools.formats.common.source import counted
from loratools.short_repr import one_line
from loratools.skipped import Skipped
from loratools.storage import system
from loratools.storage.files import quoted
from loratools.storage.leftovers import Leftover, leftovers_below, remove_leftover

_IN_USE = "a run is writing it"
_UNKNOWN = "whether its run is alive cannot be told: it is of another machine or container"


@dataclass(frozen=True)
class RemovedRun:
    """A hidden folder that a killed run left, and what became of it.

    Attributes:
        path: The hidden folder.
        output: The output that the run was writing.
        action: `removed`; or `restored` if the folder was the previous output, which got its name back.
        bytes: The size of its files on the disk, in bytes.
        started: When the run began, as ISO 8601 in UTC; None if that is not known.
        process: The id of its process; None if that is not known.
        host: The name of its machine; None if that is not known.
        units: How many units of work were finished. `--resume` could have continued from there.
    """

    path: Path
    output: Path
    action: Literal["removed", "restored"]
    bytes: int
    started: str | None
    process: int | None
    host: str | None
    units: int

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `removed` in the document of `loratools clean --json`."""
        return {**vars(self), "path": str(self.path), "output": str(self.output)}


@dataclass(frozen=True)
class CleanReport:
    """The report of `clean`.

    Attributes:
        folder: The folder that was searched, with its subfolders.
        removed: What was removed; with `plan`, what would be removed.
        kept: Hidden folders that stay, and why.
        failed: Folders that could not be removed or read, and why.
        planned: Whether this is a plan, so that nothing was removed.

    Example:
        >>> import loratools
        >>> report = loratools.clean("fixtures", plan=True)
        >>> report.bytes, report.planned
        (0, True)
    """

    folder: Path
    removed: tuple[RemovedRun, ...]
    kept: tuple[Skipped, ...]
    failed: tuple[Skipped, ...]
    planned: bool

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def bytes(self) -> int:
        """The size of the removed folders on the disk, in bytes."""
        return sum(run.bytes for run in self.removed if run.action == "removed")

    @property
    def error(self) -> MachineError | None:
        """All failures as one error; None if there are none."""
        if not self.failed:
            return None
        return MachineError(
            f"{counted(len(self.failed), 'folder')} could not be cleaned",
            details=[f"{quoted(skipped.name)}: {skipped.why}" for skipped in self.failed],
            hint="check the owner and mode of the folders, and run it again",
        )

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools clean --json`, without the fields common to all verbs."""
        return {
            "folder": str(self.folder),
            "planned": self.planned,
            "removed": [run.to_dict() for run in self.removed],
            "kept": [{"path": skipped.name, "why": skipped.why} for skipped in self.kept],
            "failed": [{"path": skipped.name, "why": skipped.why} for skipped in self.failed],
            "bytes": self.bytes,
        }


@checked
def clean(folder: str | Path, *, plan: bool = False) -> CleanReport:
    """Remove the leftovers of killed runs in a folder and its subfolders.

    A run prepares its output in a hidden folder with a journal in it, and holds a lock on it while it runs. A folder
    without a running process is removed, whatever its name, machine or container; a locked one stays. Leftovers that
    `resume` could continue from are removed as well. Nothing that loratools did not write is touched.

    Args:
        folder: The folder to search, with its subfolders. Links are not followed.
        plan: List what would be removed, and remove nothing.

    Returns:
        A report of what was removed, with sizes in bytes, and of what stays.

    Raises:
        UsageError: The folder does not exist.

    Example:
        >>> import loratools
        >>> loratools.clean("fixtures").removed
        ()
    """
    place = Path(folder)
    if not place.is_dir():
        kind = "is no folder" if system.exists(place) else "does not exist"
        raise UsageError(f"{quoted(place)} {kind}", hint="name the folder that outputs are written to")
    unreadable: list[Path] = []
    removed: list[RemovedRun] = []
    staying: list[Skipped] = []
    failed: list[Skipped] = []
    for leftover in list(leftovers_below(place, unreadable)):
        if leftover.state != "dead":
            staying.append(Skipped(str(leftover.path), _IN_USE if leftover.state == "alive" else _UNKNOWN, "file"))
            continue
        try:
            if not plan:
                remove_leftover(leftover)
        except MachineError as error:
            failed.append(Skipped(str(leftover.path), error.message, "file"))
            continue
        removed.append(_removed_run(leftover))
    failed += [Skipped(str(path), "it cannot be looked into", "file") for path in unreadable]
    return CleanReport(place, tuple(removed), tuple(staying), tuple(failed), plan)


def _removed_run(leftover: Leftover) -> RemovedRun:
    head = leftover.recorded.head if leftover.recorded is not None else None
    return RemovedRun(
        path=leftover.path,
        output=leftover.output,
        action="restored" if leftover.replaced_output else "removed",
        bytes=leftover.bytes,
        started=datetime.fromtimestamp(head.started, timezone.utc).isoformat(timespec="seconds") if head else None,
        process=head.process if head else None,
        host=head.host if head else None,
        units=len(leftover.recorded.units) if leftover.recorded is not None else 0,
    )
