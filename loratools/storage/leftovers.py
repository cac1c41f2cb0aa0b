"""What killed runs have left below a folder: found by the journal or record in it, told from what living runs hold.

A hidden folder with a journal is ours whatever its name. One without is about to become an output, or was one until it
was replaced: it has our name and the record of an output. Nothing else is touched.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratools.storage import system
from loratools.storage.files import machine_error
from loratools.storage.liveness import is_alive
from loratools.storage.ownership import RECORD
from loratools.storage.removal import discard
from loratools.storage.run_journal import JOURNAL, RecordedRun, read_journal
from loratools.storage.staging_names import is_aside, output_in_name, process_in_name_is_gone

# A run writes its journal right after it has made its folder; an empty folder that is older was left by a killed run.
_JUST_MADE_SECONDS = 60.0

State = Literal["dead", "alive", "unknown"]


@dataclass(frozen=True)
class Leftover:
    """A hidden folder of ours.

    Attributes:
        path: The folder.
        output: What it was made for.
        state: Whether its run is dead; `unknown` if that cannot be decided.
        bytes: What its files take on the disk that no other name holds.
        recorded: What its journal says, if it has one.
        replaced_output: Whether it is the old output, which has no other name: the run was killed before the new one
            had its place.
    """

    path: Path
    output: Path
    state: State
    bytes: int
    recorded: RecordedRun | None
    replaced_output: bool


def leftovers_below(folder: Path, unreadable: list[Path]) -> Iterator[Leftover]:
    """Every hidden folder of ours in a folder and the folders below it; links are not followed.

    Args:
        folder: Where to look.
        unreadable: Gets the folders that cannot be looked into.
    """
    try:
        names = system.folders_in(folder)
    except OSError:
        unreadable.append(folder)
        return
    for name in names:
        path = folder / name
        try:
            leftover = _leftover(path)
        except OSError:
            unreadable.append(path)
            continue
        if leftover is None:
            yield from leftovers_below(path, unreadable)
        else:
            yield leftover


def remove_leftover(leftover: Leftover) -> None:
    """Remove what a dead run left. An old output that was moved aside gets its name back, where that is free.

    Raises:
        MachineError: It is still there, or a part of it.
    """
    try:
        if leftover.replaced_output:
            system.rename(leftover.path, leftover.output)
            return
        discard(leftover.path, leftover.output)
        if system.exists(leftover.path):
            system.remove_folder(leftover.path)  # which says why not
    except OSError as error:
        raise machine_error(error, "remove", leftover.path) from error


def _leftover(path: Path) -> Leftover | None:
    recorded = read_journal(path) if system.exists(path / JOURNAL) else None
    output = _output(path, recorded)
    if output is None:
        return None
    if recorded is None and not system.exists(path / RECORD):
        # Killed before its journal had a line, or with one that a power cut took.
        if [name for name in system.names_in(path) if name != JOURNAL]:
            return None
        state: State = "dead" if _was_left_empty(path) else "alive"
    elif is_aside(path.name):
        # Nobody holds a folder that was moved aside; the run that does it lives a moment longer.
        state = "dead" if process_in_name_is_gone(path.name) else "unknown"
    else:
        state = "alive" if is_alive(path, recorded.head if recorded is not None else None) else "dead"
    replaced = is_aside(path.name) and not system.exists(output)
    return Leftover(path, output, state, _bytes_below(path), recorded, replaced)


def _output(path: Path, recorded: RecordedRun | None) -> Path | None:
    if recorded is not None:
        head = recorded.head
        return path.parent if head.inside and head.output == path.parent.name else path.parent / head.output
    name = output_in_name(path.name)
    return path.parent / name if name is not None else None


def _was_left_empty(path: Path) -> bool:
    return process_in_name_is_gone(path.name) or time.time() - system.stat(path).st_mtime > _JUST_MADE_SECONDS


def _bytes_below(path: Path) -> int:
    total = 0
    for name in system.names_in(path):
        status = system.lstat(path / name)
        if stat.S_ISDIR(status.st_mode):
            total += _bytes_below(path / name)
        elif status.st_nlink == 1:
            total += status.st_size
    return total
