"""How folders of ours are removed: what was being prepared, and of an old output nothing but what is ours."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from loratools.errors import LoraToolsError
from loratools.storage import system
from loratools.storage.held_inputs import hold_no
from loratools.storage.output_paths import stat_or_none
from loratools.storage.ownership import RECORD, entries_below, owned_files
from loratools.storage.run_journal import JOURNAL


def remove(folder: Path) -> None:
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
        # The journal last: without it nobody can tell whose the rest is.
        for name in sorted(names, key=lambda name: name == JOURNAL):
            path = folder / name
            try:
                if stat.S_ISDIR(system.lstat(path).st_mode):
                    remove(path)
                else:
                    system.remove_file(path)
            except OSError:
                continue
        try:
            system.remove_folder(folder)
            return
        except OSError:
            continue


def remove_replaced(old: Path, real: Path, owned: frozenset[str]) -> None:
    """Remove the names of an old output: of files in `owned`, and of what is in the new one too.

    What somebody put there in the last moment is moved into the new output; what cannot be keeps its place, in a folder
    that has a name of its own.
    """
    for _ in range(2):  # one failure may be passing
        try:
            entries = list(entries_below(old))
        except OSError:
            continue
        # The content of a folder before the folder; the record last, which tells of what is left that it is ours.
        for name, is_folder in sorted(entries, key=lambda entry: (entry[0] != RECORD, entry), reverse=True):
            path = old / name
            with suppress(OSError):
                if is_folder:
                    system.remove_folder(path)
                elif name in owned or _is_same_entry(path, real / name):
                    system.remove_file(path)
                elif system.exists(real) and not system.exists(real / name):
                    make_parents((real / name).parent, [])
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


def discard(staging: Path, real: Path) -> None:
    """Remove what a dead run left for `real`. It is no input, though its record is read.

    Once its journal is gone, a hidden folder is about to become the output, or holds the old output: everything that is
    not ours by the record in it stays, under its name in `real`.
    """
    hold_no(staging)
    if not system.exists(staging / JOURNAL) and system.exists(staging / RECORD):
        try:
            owned = owned_files(staging)
        except (LoraToolsError, OSError):
            return
        remove_replaced(staging, real, owned if owned is not None else frozenset())
    else:
        remove(staging)


def make_parents(folder: Path, created: list[Path]) -> None:
    """Make a folder and those above it that are missing, and add them to `created`."""
    missing = []
    while stat_or_none(folder) is None:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            system.make_folder(path)
        except FileExistsError:  # another run was faster
            continue
        created.append(path)
