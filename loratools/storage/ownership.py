"""Which files of an output this program wrote, by its own record beside them: `--overwrite` replaces no others.

A folder has `loratools.json`, whose member `files` names every file that was written with it, with its size and a
digest of its content. A single file says `loratools.version` in its header. A file of a folder that was changed since
counts as a person's.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from loratools._version import __version__
from loratools.errors import InputError, UsageError
from loratools.storage import system
from loratools.storage.files import fingerprint, identify
from loratools.storage.json_file import read_json, write_new
from loratools.storage.run_journal import JOURNAL

RECORD = "loratools.json"
# In the header of a single file, beside what else it says of itself.
MARK = "loratools.version"
MAX_RECORD_BYTES = 64 << 20


def write_record(folder: Path) -> None:
    """Write `loratools.json` with all files of `folder`, which is complete; what the file says already stays.

    Raises:
        MachineError: the disk is full, or there is no permission.
        OSError: the same, of a call that names no file.
    """
    path = folder / RECORD
    document: dict[str, object] = {"loratools": __version__}
    if system.exists(path):
        document |= read_json(path, max_bytes=MAX_RECORD_BYTES)
        system.remove_file(path)
    files = {
        name: _entry(folder / name) for name, is_folder in entries_below(folder) if not is_folder and name != JOURNAL
    }
    document["files"] = files
    write_new(path, (json.dumps(document, indent=2) + "\n").encode("utf-8"))


def owned_files(folder: Path) -> frozenset[str] | None:
    """Names, relative and with forward slashes, of the files that are still as loratools wrote them, the record too.

    None where the folder has no record.

    Raises:
        MachineError: the disk failed, or there is no permission; OSError where the call names no file.
    """
    try:
        document = read_json(folder / RECORD, max_bytes=MAX_RECORD_BYTES)
    except (UsageError, InputError):
        return None
    files = document.get("files")
    if not isinstance(files, Mapping) or not isinstance(document.get("loratools"), str):
        return None
    there = {name for name, is_folder in entries_below(folder) if not is_folder}
    return frozenset({RECORD, *(name for name in there & files.keys() if _is_as_recorded(folder / name, files[name]))})


def foreign_entries(folder: Path, owned: frozenset[str]) -> list[str]:
    """What else the folder holds: files, and folders (with a slash at the end) that hold nothing of ours."""
    foreign: list[str] = []
    above_owned = {parent.as_posix() for name in owned for parent in Path(name).parents}
    closed: tuple[str, ...] = ()
    for name, is_folder in entries_below(folder):
        if name.startswith(closed):
            continue
        if is_folder and name not in above_owned:
            foreign.append(f"{name}/")
            closed = (*closed, f"{name}/")
        elif not is_folder and name not in owned:
            foreign.append(name)
    return foreign


def is_marked(path: Path) -> bool:
    """Whether a single file says in its header that loratools wrote it.

    Raises:
        MachineError: the disk failed, or there is no permission.
    """
    from loratools.storage.gguf_reader import read_gguf
    from loratools.storage.safetensors_reader import read_header

    try:
        if path.suffix.lower() == ".gguf":
            return MARK in read_gguf(path).fields
        return MARK in read_header(path).metadata
    except InputError:
        return False


def entries_below(folder: Path, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Everything below `folder`, by relative name, and whether it is a folder; links are not followed."""
    for name in system.names_in(folder):
        is_folder = stat.S_ISDIR(system.lstat(folder / name).st_mode)
        yield prefix + name, is_folder
        if is_folder:
            yield from entries_below(folder / name, f"{prefix}{name}/")


def _entry(path: Path) -> dict[str, object]:
    file = identify(path)
    return {"bytes": file.size, "digest": fingerprint(file)}


def _is_as_recorded(path: Path, entry: object) -> bool:
    if not isinstance(entry, Mapping) or not stat.S_ISREG(system.lstat(path).st_mode):
        return False
    file = identify(path)
    return file.size == entry.get("bytes") and fingerprint(file) == entry.get("digest")
