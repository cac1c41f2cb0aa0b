"""The journal of a run, in the hidden folder in which it prepares its output: whose it is, its plan, and what is done.

`.loratools-run.jsonl` is a JSON document a line. The first says what the folder is for and who fills it; a run that can
be resumed adds its plan and a line for each unit of work that is done. The file is locked while the run lives. It is
gone before the folder takes the name of the output. A line that a killed run left half written is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loratools._version import __version__
from loratools.storage import system
from loratools.storage.files import machine_error

JOURNAL = ".loratools-run.jsonl"
# A line of a unit has a few hundred bytes, and a model of a trillion weights a hundred thousand units.
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class RunHead:
    """The first line of a journal.

    Attributes:
        output: The name of the output, in the folder where the hidden folder was made.
        inside: Whether the hidden folder was made inside the output, an empty folder that stays.
        process: The id of the process.
        space: A digest of its machine and space of process ids.
        host: The name of its machine.
        started: When it began, in seconds since 1970.
        loratools: The version of the program.
    """

    output: str
    inside: bool
    process: int
    space: str
    host: str
    started: float
    loratools: str = __version__

    @classmethod
    def of(cls, document: object) -> RunHead | None:
        """The head in a line; None if it is none of ours."""
        match document:
            case {
                "output": str(output), "inside": bool(inside), "process": int(process), "space": str(space),
                "host": str(host), "started": int() | float() as started, "loratools": str(version),
            }:  # fmt: skip
                return cls(output, inside, process, space, host, started, version)
        return None


@dataclass(frozen=True)
class RecordedRun:
    """What a journal says.

    Attributes:
        head: Whose it is.
        plan: What the run was to do, of one that can be resumed.
        units: Facts about each unit that is done, by its name.
        length: Bytes of the complete lines.
    """

    head: RunHead
    plan: Mapping[str, Any] | None = None
    units: Mapping[str, Any] = field(default_factory=dict)
    length: int = 0


def read_journal(folder: Path) -> RecordedRun | None:
    """What the journal in a folder says; None if there is none of ours.

    Raises:
        OSError: It cannot be read.
    """
    try:
        fd = system.open_to_read(folder / JOURNAL)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        size = min(system.fstat(fd).st_size, _MAX_BYTES)
        data = memoryview(bytearray(size))
        position = 0
        while position < size and (count := system.read_into(fd, data[position:], position)):
            position += count
    finally:
        system.close(fd)
    return _parsed(bytes(data[:position]))


def _parsed(data: bytes) -> RecordedRun | None:
    head: RunHead | None = None
    plan: Mapping[str, Any] | None = None
    units: dict[str, Any] = {}
    length = 0
    for line in data.splitlines(keepends=True):
        try:
            document = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            break
        if head is None:
            head = RunHead.of(document)
            if head is None:
                return None
        elif isinstance(document.get("plan"), dict):
            plan = document["plan"]
        elif isinstance(document.get("unit"), str):
            units[document["unit"]] = document.get("done")
        length += len(line)
    return RecordedRun(head, plan, units, length) if head is not None else None


class RunJournal:
    """The journal of the run at hand, open and locked."""

    def __init__(self, path: Path, fd: int, end: int, units: Mapping[str, Any]) -> None:
        self.path = path
        self.units = units
        self._fd = fd
        self._end = end
        self._lines_added = 0

    @classmethod
    def create(cls, folder: Path, head: RunHead) -> RunJournal:
        """Begin a journal in a folder that has none.

        Raises:
            OSError: The disk is full or failed.
        """
        fd = system.create(folder / JOURNAL)
        journal = cls(folder / JOURNAL, fd, 0, {})
        try:
            system.lock_file(fd)
            journal._add(asdict(head))
            system.fsync(fd)  # after a power cut it says whose the folder is
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def reopened(cls, folder: Path, recorded: RecordedRun) -> RunJournal:
        """Go on with the journal of a run that is dead; what it left half written is cut off.

        Raises:
            BlockingIOError: Another process holds it.
            OSError: The disk failed.
        """
        fd = system.open_to_write(folder / JOURNAL)
        try:
            system.lock_file(fd)
            system.cut(fd, recorded.length)
        except BaseException:
            system.close(fd)
            raise
        return cls(folder / JOURNAL, fd, recorded.length, recorded.units)

    @property
    def has_units(self) -> bool:
        """Whether anything is done that a later run could keep."""
        return bool(self.units) or self._lines_added > 0

    def note_plan(self, plan: Mapping[str, Any]) -> None:
        """Write down what the run is to do; raises MachineError."""
        try:
            self._add({"plan": plan})
        except OSError as error:
            raise machine_error(error, "write", self.path) from error

    def note(self, unit: str, outcome: object) -> None:
        """Write down that a unit is done, with what is known of it.

        Raises:
            MachineError: The disk is full or failed.
        """
        try:
            self._add({"unit": unit, "done": outcome})
        except OSError as error:
            raise machine_error(error, "write", self.path) from error
        self._lines_added += 1

    def close(self) -> None:
        """Let go of the file, and of the lock."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                system.close(fd)
            except OSError:
                return  # what counts in it was written, or is done again

    def _add(self, document: Mapping[str, Any]) -> None:
        data = memoryview((json.dumps(document, separators=(",", ":")) + "\n").encode())
        # A failed write may have been written in part: the next line goes to the same place.
        position = self._end
        while len(data):
            count = system.write_from(self._fd, data, position)
            data, position = data[count:], position + count
        self._end = position
