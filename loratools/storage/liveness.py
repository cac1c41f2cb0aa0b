"""Whether the run that fills a hidden folder is alive: it holds a lock, whatever its process id or machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from loratools.storage import system
from loratools.storage.run_journal import JOURNAL, RunHead
from loratools.storage.staging_names import process_in_name_is_gone, process_space


def is_alive(folder: Path, head: RunHead | None) -> bool:
    """Whether a living run holds the folder.

    Where the file system has no locks, or grants every one, the process id counts, and a run of another machine or
    container is taken for alive.

    Raises:
        OSError: There is no permission to ask for the lock.
    """
    held = _is_held(folder)
    if held is not None:
        return held
    if head is None:
        return not process_in_name_is_gone(folder.name)
    return head.space != process_space() or system.process_lives(head.process)


def _is_held(folder: Path) -> bool | None:
    """Whether somebody has the lock of the folder or of its journal; None if locks say nothing here."""
    descriptors: list[int] = []
    try:
        first = system.lock_folder(folder)
        if first is not None:
            descriptors.append(first)
            return None if _granted_again(folder, descriptors) else False
        fd = system.open_to_write(folder / JOURNAL)
        descriptors.append(fd)
        return False if system.lock_file(fd) else None
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return None
    finally:
        for fd in descriptors:
            with suppress(OSError):
                system.close(fd)


def _granted_again(folder: Path, descriptors: list[int]) -> bool:
    """Whether a lock that is held is granted a second time: then it means nothing."""
    try:
        second = system.lock_folder(folder)
    except BlockingIOError:
        return False
    if second is not None:
        descriptors.append(second)
    return True
