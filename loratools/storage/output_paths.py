"""What an output's name means on this machine: its real path, and what is there now, with errors that name it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from loratools.errors import UsageError
from loratools.storage import system
from loratools.storage.files import machine_error, quoted


def real_path_of(out: Path) -> Path:
    """The path without links; raises UsageError where it cannot be an output."""
    try:
        real = system.real_path(out)
    except (OSError, ValueError) as error:
        folder_is_absent = isinstance(error, FileNotFoundError) and not out.is_absolute()
        hint = (
            "the folder that you are in no longer exists; go to another one, or give a full path"
            if folder_is_absent
            else None
        )
        raise UsageError(f"{quoted(out)} cannot be the name of an output", hint=hint) from error
    if not real.name:
        raise UsageError(f"{quoted(out)} cannot be an output")
    return real


def stat_or_none(path: Path) -> os.stat_result | None:
    """What is there, links followed; None if nothing is. Raises MachineError where it cannot be looked at."""
    try:
        return system.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{quoted(path)} is a link that leads back to itself") from error
        raise machine_error(error, "look at", path) from error


def names_in(path: Path) -> list[str]:
    """The names in a folder; raises MachineError where it cannot be looked into."""
    try:
        return system.names_in(path)
    except OSError as error:
        raise machine_error(error, "look into", path) from error
