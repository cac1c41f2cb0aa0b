"""Strict reader of safetensors headers: every byte of the file belongs to exactly one thing, and is said to.

Format: https://github.com/huggingface/safetensors#format. What is accepted here, the reference accepts too. Refused
here and accepted there: a key twice (two parsers could see two models), a space before the header, unknown fields,
and more than 8 axes. `__metadata__: null` is what MLX writes where it has nothing to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from loratools.errors import FormatError
from loratools.hints import DAMAGED
from loratools.storage.files import identify, quoted, read_bytes
from loratools.storage.header_columns import HeaderColumns, header_columns
from loratools.storage.json_file import kind_of, parse_json
from loratools.storage.sniff import ENOUGH, Sniffed, describe
from loratools.storage.stored import StoredTensor
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.files import ByteRange, FileId
from loratools.tensors.lazy import LazyTensor

# From the format's description; not MiB.
MAX_HEADER = 100_000_000
_METADATA_NAME = b'"__metadata__"'
_METADATA_FIRST = b"{" + _METADATA_NAME + b":"
_MAX_AXES = 8
_MAX_NAME = 4096
_MAX_COUNT = (1 << 63) - 1


@dataclass(frozen=True)
class SafetensorsFile:
    """What a header says; `tensors` in the order of their bytes in the file."""

    file: FileId
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    data_offset: int


class HeaderText(NamedTuple):
    """A header whose description of the tensors is not parsed.

    Attributes:
        file: The file.
        metadata: The texts of `__metadata__`.
        entries: The text of all else, as it is in the file but for blanks at its end.
        data_offset: Where the values begin.
    """

    file: FileId
    metadata: dict[str, str]
    entries: bytes
    data_offset: int


def read_header_text(path: Path) -> HeaderText | None:
    """Return the metadata of a safetensors file and the text that describes its tensors, without parsing the text.

    The result is None if the metadata is neither the first entry nor missing, or if it is invalid.

    Raises:
        UsageError: There is no such file.
        FormatError: It is not a safetensors file.
    """
    file = identify(path)
    header, data_offset = _header_bytes(file)
    if not header.startswith(_METADATA_FIRST):
        return HeaderText(file, {}, header.rstrip(b" "), data_offset) if _METADATA_NAME not in header else None
    try:
        text = header.decode("utf-8")
        _, end = json.JSONDecoder().raw_decode(text, len(_METADATA_FIRST))
        metadata = _metadata(file, parse_json(text[len(_METADATA_FIRST) : end].encode(), "the header"))
        _refuse_lone_surrogates([*metadata, *metadata.values()], "the header")
    except (ValueError, FormatError):
        return None
    entries = text[end:].encode().rstrip(b" ")
    return HeaderText(file, metadata, entries, data_offset) if _METADATA_NAME not in entries else None


def read_header(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file. No values are read.

    The header read last is kept: detection asks each format and layout in turn, of one file after the other.

    Raises:
        UsageError: There is no such file.
        FormatError: It is not a safetensors file, or not a sound one.
    """
    global _last
    file = identify(path)
    # A program that rewrites a file can set back its size and modification time, but not its change time.
    key = file, file.ctime_ns
    if _last is None or _last[0] != key:
        _last = key, _read_header(path, file)
    last = _last[1]
    # Mappings of its own for each caller, which may change them.
    return SafetensorsFile(file, dict(last.tensors), dict(last.metadata), last.data_offset)


_last: tuple[tuple[FileId, int], SafetensorsFile] | None = None


def _read_header(path: Path, file: FileId) -> SafetensorsFile:
    header, data_offset = _header_bytes(file)
    subject = f"the header of {quoted(path)}"
    columns = header_columns(header)
    if columns is None or columns.nbytes != file.size - data_offset:
        columns = _checked_columns(file, header, data_offset, subject)
    metadata = _metadata(file, columns.metadata)
    if b"\\u" in header:
        _refuse_lone_surrogates([*columns.names, *metadata, *metadata.values()], subject)
    offsets = [data_offset + begin for begin in columns.begins]
    locations = map(ByteRange, repeat(file), offsets, columns.sizes)
    sources = map(StoredTensor, locations, columns.shapes, columns.dtypes)
    tensors = dict(zip(columns.names, map(LazyTensor, columns.shapes, columns.dtypes, sources), strict=True))
    return SafetensorsFile(file, tensors, metadata, data_offset)


def _checked_columns(file: FileId, header: bytes, data_offset: int, subject: str) -> HeaderColumns:
    """The columns of a header in any spelling, each entry checked on its own.

    Raises:
        FormatError: The header is not sound, or does not describe the file.
    """
    entries = parse_json(header, subject)
    if not isinstance(entries, dict):
        raise FormatError(
            f"{subject} holds {kind_of(entries)}; an object is needed", hint=DAMAGED, defect="container-header"
        )
    metadata = entries.pop("__metadata__", None)
    _metadata(file, metadata)  # what is wrong with it is said before what is wrong with a tensor
    if b"\\u" in header:
        _refuse_lone_surrogates(entries, subject)
    spans = sorted([_entry(file, name, value) for name, value in entries.items()], key=itemgetter(0, 1))
    _check_tiling(file, data_offset, spans)
    return HeaderColumns(
        names=[span[4] for span in spans],
        dtypes=[span[3] for span in spans],
        shapes=[span[2] for span in spans],
        begins=[span[0] for span in spans],
        sizes=[span[1] - span[0] for span in spans],
        metadata=metadata,
    )


# begin, end, shape, dtype, name
_Span = tuple[int, int, tuple[int, ...], str, str]


def _header_bytes(file: FileId) -> tuple[bytes, int]:
    first = read_bytes(ByteRange(file, 0, min(file.size, ENOUGH)))
    length = int.from_bytes(first[:8], "little")
    if len(first) > 8 and 2 <= length <= min(MAX_HEADER, file.size - 8) and first[8:9] == b"{":
        return read_bytes(ByteRange(file, 8, length)), 8 + length
    sniffed = describe(first)
    if sniffed is not None and sniffed.kind != "a safetensors file":
        raise _misnamed(file, sniffed)
    if file.size < 10:
        raise FormatError(
            f"{quoted(file.path)} has {file.size} bytes; it is no model file",
            hint=DAMAGED,
            defect="container-truncated",
        )
    if length > MAX_HEADER:
        raise FormatError(
            f"{quoted(file.path)} is no safetensors file: it declares a header of {length:,} bytes, "
            f"and {MAX_HEADER:,} are allowed",
            hint=DAMAGED,
            defect="container-header-size",
        )
    if length > file.size - 8:
        raise FormatError(
            f"{quoted(file.path)} is cut off: it declares a header of {length:,} bytes, and {file.size - 8:,} follow",
            hint=DAMAGED,
            defect="container-truncated",
        )
    raise FormatError(
        f"{quoted(file.path)} is no safetensors file: its header does not begin with '{{'",
        hint=DAMAGED,
        defect="container-header",
    )


def _misnamed(file: FileId, sniffed: Sniffed) -> FormatError:
    # Nothing tells which of all formats an empty file was to be.
    what = sniffed.kind if file.size == 0 else f"not a safetensors file but {sniffed.kind}"
    return FormatError(f"{quoted(file.path)} is {what}", hint=sniffed.hint, defect="container-type")


def _refuse_lone_surrogates(texts: Iterable[str], subject: str) -> None:
    # Half of a pair is valid in a Python text, but cannot be written back as UTF-8.
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{subject} has a text with half of a surrogate pair", hint=DAMAGED, defect="container-header"
        ) from error


def _metadata(file: FileId, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problem = f"'__metadata__' of {quoted(file.path)} is {kind_of(value)}"
        raise FormatError(f"{problem}; an object is needed", hint=DAMAGED, defect="container-header")
    for key, text in value.items():
        if not isinstance(text, str):
            raise FormatError(
                f"{quoted(key)} in '__metadata__' of {quoted(file.path)} is {kind_of(text)}; only texts are allowed",
                hint="save the file again with such values turned into text",
                defect="container-header",
            )
    return value


def _entry(file: FileId, name: str, value: object) -> _Span:
    """One tensor of the header, checked on its own. Loops and no generators: a file may have 90,000 of them."""
    if len(name) > _MAX_NAME:
        raise FormatError(
            f"{quoted(file.path)} has a tensor whose name has {len(name):,} characters",
            hint=DAMAGED,
            defect="container-entry",
        )
    if not isinstance(value, dict):
        raise _bad(file, name, f"is {kind_of(value)}; an object is needed")
    if len(value) != 3 or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        missing = [field for field in ("dtype", "shape", "data_offsets") if field not in value]
        if missing:
            raise _bad(file, name, f"has no {quoted(missing[0])}")
        extra = next(field for field in value if field not in ("dtype", "shape", "data_offsets"))
        raise _bad(file, name, f"has the unknown field {quoted(extra)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _bad(file, name, f"has the unknown dtype {quoted(str(dtype))}")
    if not _are_counts(shape):
        raise _bad(file, name, f"has the shape {_shown(shape)}; whole numbers from 0 are needed")
    if len(shape) > _MAX_AXES:
        raise _bad(file, name, f"has {len(shape)} axes; at most {_MAX_AXES} are supported")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _bad(file, name, f"has the data_offsets {_shown(offsets)}; two whole numbers from 0 are needed")
    begin, end = offsets
    if begin > end:
        raise _bad(file, name, f"begins at byte {begin:,} and ends before that, at {end:,}")
    elements = 1
    for axis in shape:
        elements *= axis
        # On the way, not at the end: 2^63 x 2^63 x 0 overflows in readers that multiply from the left.
        if elements > _MAX_COUNT:
            raise _bad(file, name, f"has the shape {_shown(shape)}, more elements than can be counted")
    if elements * bits % 8:
        raise _bad(file, name, f"has {elements:,} values of {bits} bits, which is no whole number of bytes")
    if elements * bits // 8 != end - begin:
        requirement = f"{dtype} of shape {_shown(shape)} needs {elements * bits // 8:,} bytes"
        raise _bad(file, name, f"has {end - begin:,} bytes, and {requirement}")
    return begin, end, tuple(shape), dtype, name


def _are_counts(values: object) -> bool:
    """Whether this is a list of whole numbers from 0 that fit in 63 bits; `true` is no number."""
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110 (a generator costs three times as much)
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            return False
    return True


def _bad(file: FileId, name: str, fault: str) -> FormatError:
    return FormatError(f"tensor {quoted(name)} of {quoted(file.path)} {fault}", hint=DAMAGED, defect="container-entry")


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _check_tiling(file: FileId, data_offset: int, spans: list[_Span]) -> None:
    expected = 0
    before: _Span | None = None
    for span in spans:
        begin, end, _, _, name = span
        if begin != expected:
            described = f"tensor {quoted(name)} (bytes {begin:,} to {end:,})"
            if begin > expected:
                fault = f"bytes {expected:,} to {begin:,} before {described} belong to no tensor"
            else:
                assert before is not None  # nothing begins before byte 0
                fault = f"{described} overlaps tensor {quoted(before[4])} (bytes {before[0]:,} to {before[1]:,})"
            raise FormatError(f"{quoted(file.path)} is not sound: {fault}", hint=DAMAGED, defect="container-layout")
        expected, before = end, span
    have = file.size - data_offset
    if have < expected:
        assert before is not None
        first_cut = next(span for span in spans if span[1] > have)
        raise FormatError(
            f"{quoted(file.path)} is cut off: {expected - have:,} bytes are missing "
            f"(it declares {data_offset + expected:,} and has {file.size:,}), "
            f"from tensor {quoted(first_cut[4])} on",
            hint=DAMAGED,
            defect="container-truncated",
        )
    if have > expected:
        raise FormatError(
            f"{quoted(file.path)} has {have - expected:,} bytes after its last tensor; "
            f"it declares {data_offset + expected:,} and has {file.size:,}",
            hint=DAMAGED,
            defect="container-trailing-bytes",
        )
