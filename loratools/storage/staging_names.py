"""Names of the hidden folders in which outputs are prepared: `.NAME.loratools-PROCESS-SPACE`, beside the output.

A folder of a killed run is recognised by its owner being gone: the process id in its name is free, in our own space of
process ids, and nobody holds its lock. Each of the two can be wrong alone (containers share folders but not process
ids; some network file systems grant every lock).
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from loratools.storage import system

_SUFFIX = re.compile(r"(?P<aside>old-)?(?P<process>\d+)-(?P<space>[0-9a-f]{8})[0-9a-f]{8}")
_NAME = re.compile(r"\.(?P<output>.+)\.loratools-" + _SUFFIX.pattern)


def name_prefix(real: Path) -> str:
    """What the names of all hidden folders for this output begin with."""
    # A name may have 255 bytes; ours adds at most 60.
    return "." + os.fsencode(real.name)[:180].decode("utf-8", errors="ignore") + ".loratools-"


def name_suffix() -> str:
    """The rest of the name of a new hidden folder of this process."""
    return f"{system.process_id()}-{process_space()}{system.random_hex(8)}"


def process_space() -> str:
    """A digest of this machine and its space of process ids."""
    return hashlib.sha256(system.process_space().encode()).hexdigest()[:8]


def output_in_name(name: str) -> str | None:
    """The name of the output, possibly cut, in the name of a hidden folder; None if it is the name of none."""
    match = _NAME.fullmatch(name)
    return match["output"] if match else None


def is_aside(name: str) -> bool:
    """Whether a hidden folder holds an old output that was moved out of the way."""
    match = _NAME.fullmatch(name)
    return match is not None and match["aside"] is not None


def staging_folders(real: Path, *, aside: bool = False, inside: bool = False) -> list[Path]:
    """The hidden folders for this output: in it, or beside it; `aside`: those of old outputs instead."""
    prefix = name_prefix(real)
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


def process_in_name_is_gone(name: str) -> bool:
    """Whether the process in a name is of our own space, and there no more."""
    match = _SUFFIX.search(name)
    return match is not None and match["space"] == process_space() and not system.process_lives(int(match["process"]))


def owner_is_gone(staging: Path) -> bool:
    """Whether the process in its name is gone, and nobody holds its lock."""
    if not process_in_name_is_gone(staging.name):
        return False
    try:
        lock = system.lock_folder(staging)
    except OSError:
        return False
    if lock is not None:
        with suppress(OSError):
            system.close(lock)
    return True
