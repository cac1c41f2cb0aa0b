"""Files of one trainer: where two headers have the same tensors and all single numbers are the same, so are their rows.

A library of thousands has a few dozen sets of tensors, for the models, ranks and dtypes that its trainers know; what
differs from file to file is what the header says for people. So the tensors of a header are looked at once, and of the
next file that has them the row is taken over, with its own title, trigger words, date, size and path.

What a format reads of the metadata to tell what the tensors mean is a part of the key (`_OF_FORMATS`); so is every
tensor of one element (alpha), by its bytes. A row that has warnings is of its file alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from loratools.errors import LoraToolsError
from loratools.formats.common.description import describe
from loratools.formats.common.shards import is_shard
from loratools.formats.common.source import CONFIG, is_adapter_file
from loratools.ops.listing.rows import ListedAdapter
from loratools.ops.listing.summary import revision_of
from loratools.storage.files import reading
from loratools.storage.safetensors_reader import HeaderText, read_header_text
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor

# Keys that trainers write for people, of which formats read none but these.
_FOR_PEOPLE = ("ss_", "sshs_", "modelspec.")
_OF_FORMATS = frozenset({"ss_base_model_version", "modelspec.architecture"})
# A row takes a few hundred bytes, and the places of its numbers some ten thousand.
_MOST_KNOWN = 512

_Place = tuple[int, int]


class Outline(NamedTuple):
    """What tells two files apart: the tensors of a header, and what formats read of the metadata."""

    header: HeaderText
    key: tuple[bytes, int, frozenset[tuple[str, str]]]


class KnownRows:
    """Rows by the outlines of the files that they were made of."""

    def __init__(self) -> None:
        self._places: dict[object, tuple[_Place, ...]] = {}
        self._rows: dict[tuple[object, bytes], ListedAdapter] = {}

    def row(self, outline: Outline, path: Path, modified: str | None) -> ListedAdapter | None:
        """The row of the file, where one with the same tensors and numbers is known."""
        places = self._places.get(outline.key)
        if places is None:
            return None
        numbers = _numbers(outline.header, places)
        known = self._rows.get((outline.key, numbers)) if numbers is not None else None
        if known is None:
            return None
        about = describe(outline.header.metadata)
        return replace(
            known,
            path=str(path),
            revision=revision_of(str(path)),
            bytes=outline.header.file.size,
            title=about.title if about is not None else None,
            trigger_words=about.trigger_words if about is not None else (),
            date=about.date if about is not None else None,
            modified=modified,
        )

    def keep(self, outline: Outline, row: ListedAdapter, tensors: Iterable[LazyTensor]) -> None:
        """Note the row of a file that was read in full, with all of its tensors."""
        locations = [tensor.location for tensor in tensors if tensor.elements == 1]
        if row.error is not None or row.warnings or any(location is None for location in locations):
            return
        if len(self._rows) >= _MOST_KNOWN:
            self._places.clear()
            self._rows.clear()
        start = outline.header.data_offset
        places = tuple((each.offset - start, each.nbytes) for each in locations if each is not None)
        if (numbers := _numbers(outline.header, places)) is not None:
            self._places[outline.key] = places
            self._rows[outline.key, numbers] = row


def outline_of(path: Path) -> Outline | None:
    """The outline of a file that stands for itself; None where more than its own header says what it is."""
    if is_shard(path.name) or is_adapter_file(path.name):
        return None
    try:
        if (path.parent / CONFIG).exists():
            return None
        header = read_header_text(path)
    except (LoraToolsError, OSError):
        return None  # whoever reads it in full says what is wrong
    if header is None:
        return None
    digest = hashlib.blake2b(header.entries, digest_size=16).digest()
    return Outline(header, (digest, header.file.size - header.data_offset, _of_formats(header.metadata)))


def _of_formats(metadata: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(
        (key, text) for key, text in metadata.items() if key in _OF_FORMATS or not key.startswith(_FOR_PEOPLE)
    )


def _numbers(header: HeaderText, places: Iterable[_Place]) -> bytes | None:
    """The bytes of all single numbers; None where they cannot be read, for which there are better places to say why."""
    numbers = bytearray()
    try:
        with reading(ByteRange(header.file, header.data_offset, header.file.size - header.data_offset)) as read:
            for begin, nbytes in places:
                number = bytearray(nbytes)
                read(begin, memoryview(number))
                numbers += number
    except (LoraToolsError, OSError):
        return None
    return bytes(numbers)
