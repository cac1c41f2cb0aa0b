"""Which files of an output this program wrote, by its own record beside them: `--overwrite` replaces no others.

A folder has `loratools.json`, whose member `files` is its manifest: it names every file that was written with it, with
its size, a digest of pieces of its content, which is quick to compare, and the SHA-256 of all of it. A single file says
`loratools.version` in its header. A file of a folder that was changed since counts as a person's.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from loratools._version import __version__
from loratools.errors import InputError, UsageError
from loratools.storage import system
from loratools.storage.files import fingerprint, identify, read_bytes, sha256
from loratools.storage.json_file import read_json, write_new
from loratools.storage.run_journal import JOURNAL
from loratools.tensors.files import ByteRange

RECORD = "loratools.json"
# In the header of a single file, beside what else it says of itself.
MARK = "loratools.version"
PAGE_SUFFIXES = (".html", ".htm")
MAX_RECORD_BYTES = 64 << 20
# The mark of a page stands at its beginning.
_HEAD_BYTES = 4096
# What the metadata of a picture has, as each kind of file spells it.
_PICTURE_MARKS = {
    ".png": b"tEXt" + MARK.encode() + b"\0",
    ".svg": b"<dc:title>" + MARK.encode() + b" ",
    ".pdf": b"/Creator (" + MARK.encode() + b" ",
}
_METADATA_BYTES = 16 << 10


def write_record(folder: Path, *, sha256_of: Mapping[str, str] | None = None, sampled: Iterable[str] = ()) -> None:
    """Write `loratools.json` with all files of `folder`, which is complete; what the file says already stays.

    Args:
        folder: The folder.
        sha256_of: Digests of files that were hashed while they were written, by name.
        sampled: Names of files that are too large to be hashed whole unasked.

    Raises:
        MachineError: The disk is full, or there is no permission.
        OSError: The same, of a call that names no file.
    """
    path = folder / RECORD
    document: dict[str, object] = {"loratools": __version__}
    if system.exists(path):
        document |= read_json(path, max_bytes=MAX_RECORD_BYTES)
        system.remove_file(path)
    known_digests = sha256_of or {}
    not_hashed = frozenset(sampled)
    files: dict[str, dict[str, object]] = {}
    for name, is_folder in entries_below(folder):
        if is_folder or name == JOURNAL:
            continue
        files[name] = _entry(folder / name)
        if name not in not_hashed:
            files[name]["sha256"] = known_digests.get(name) or sha256(folder / name)
    document["files"] = files
    write_new(path, (json.dumps(document, indent=2) + "\n").encode("utf-8"))


def recorded_files(folder: Path) -> Mapping[str, Mapping[str, object]] | None:
    """The manifest of a folder: what is recorded of each file, by its name; None if it has no record.

    Raises:
        MachineError: The disk failed, or there is no permission.
    """
    try:
        document = read_json(folder / RECORD, max_bytes=MAX_RECORD_BYTES)
    except (UsageError, InputError):
        return None
    files = document.get("files")
    if not isinstance(files, Mapping) or not isinstance(document.get("loratools"), str):
        return None
    return {name: entry for name, entry in files.items() if isinstance(entry, Mapping)}


def owned_files(folder: Path) -> frozenset[str] | None:
    """Names, relative and with forward slashes, of the files that are still as loratools wrote them, the record too.

    None if the folder has no record.

    Raises:
        MachineError: The disk failed, or there is no permission; OSError where the call names no file.
    """
    files = recorded_files(folder)
    if files is None:
        return None
    present = {name for name, is_folder in entries_below(folder) if not is_folder}
    return frozenset(
        {RECORD, *(name for name in present & files.keys() if _is_as_recorded(folder / name, files[name]))}
    )


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
    """Whether a single file says in its header, or in the metadata of a picture, that loratools wrote it.

    Raises:
        MachineError: The disk failed, or there is no permission.
    """
    from loratools.storage.gguf_reader import read_gguf
    from loratools.storage.safetensors_reader import read_header

    suffix = path.suffix.lower()
    if suffix in PAGE_SUFFIXES:
        return _is_page(path)
    if suffix in _PICTURE_MARKS:
        return _PICTURE_MARKS[suffix] in _ends_of(path)
    try:
        if suffix == ".gguf":
            return MARK in read_gguf(path).fields
        return MARK in read_header(path).metadata
    except InputError:
        return False


def _is_page(path: Path) -> bool:
    file = identify(path)
    head = read_bytes(ByteRange(file, 0, min(file.size, _HEAD_BYTES)))
    return head.startswith(b"<!doctype html>") and f'<meta name="{MARK}" content="'.encode() in head


def _ends_of(path: Path) -> bytes:
    """The beginning and the end of a file, where pictures have their metadata."""
    file = identify(path)
    size = min(file.size, _METADATA_BYTES)
    return b"\n".join(read_bytes(ByteRange(file, offset, size)) for offset in (0, file.size - size))


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


def _is_as_recorded(path: Path, entry: Mapping[str, object]) -> bool:
    if not stat.S_ISREG(system.lstat(path).st_mode):
        return False
    file = identify(path)
    return file.size == entry.get("bytes") and fingerprint(file) == entry.get("digest")
