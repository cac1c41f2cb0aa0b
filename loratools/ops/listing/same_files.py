"""Files with the same bytes: those of one size are hashed, all others differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from loratools.errors import LoraToolsError
from loratools.formats.common.source import ADAPTER_FILES
from loratools.storage.files import sha256


def main_file(path: Path) -> Path:
    """The file of an adapter that holds its tensors; of a folder the first that is there."""
    if not path.is_dir():
        return path
    present = (path / name for name in ADAPTER_FILES)
    return next((file for file in present if file.is_file()), path)


def same_files(paths: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of adapters whose files of tensors are the same by SHA-256. What cannot be read is left out."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        try:
            file = main_file(Path(path))
            if file.is_file():
                by_size[file.stat().st_size].append(path)
        except OSError:
            continue
    by_hash: dict[str, list[str]] = defaultdict(list)
    for alike in by_size.values():
        for path in alike if len(alike) > 1 else ():
            try:
                by_hash[sha256(main_file(Path(path)))].append(path)
            except (LoraToolsError, OSError):
                continue
    return [tuple(sorted(group)) for group in by_hash.values() if len(group) > 1]
