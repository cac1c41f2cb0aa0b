"""A header is taken apart by one pattern to what reading it object by object says, or is not taken apart by it."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from loratools.errors import LoraToolsError
from loratools.storage import safetensors_reader
from loratools.storage.header_columns import header_columns
from loratools.storage.safetensors_reader import read_header

# Different in every number: dtype, shape, bytes.
TENSORS = {"b": ("F32", [2, 3]), "a.weight": ("BF16", [5]), "scalar": ("I64", []), "empty": ("F16", [0, 7])}


def entries() -> dict[str, object]:
    described, offset = {}, 0
    for name, (dtype, shape) in TENSORS.items():
        nbytes = {"F32": 24, "BF16": 10, "I64": 8, "F16": 0}[dtype]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    return described


def spelled(header: object, *, spaces: bool = False) -> bytes:
    return json.dumps(header, separators=(", ", ": ") if spaces else (",", ":")).encode()


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize("metadata", ["first", "last", "null", "none"])
def test_header_as_writers_spell_it_is_in_columns(metadata: str, spaces: bool) -> None:
    texts = {"format": "pt", "note": 'a "quoted" {"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'}
    header = {
        "first": {"__metadata__": texts, **entries()},
        "last": {**entries(), "__metadata__": texts},
        "null": {"__metadata__": None, **entries()},
        "none": entries(),
    }[metadata]

    columns = header_columns(spelled(header, spaces=spaces) + b"   ")

    assert columns is not None
    assert columns.names == ["b", "a.weight", "scalar", "empty"]
    assert columns.dtypes == ["F32", "BF16", "I64", "F16"]
    assert columns.shapes == [(2, 3), (5,), (), (0, 7)]
    assert columns.begins == [0, 24, 34, 42]
    assert columns.sizes == [24, 10, 8, 0]
    assert columns.nbytes == 42
    assert columns.metadata == (texts if metadata in ("first", "last") else None)


def test_columns_are_in_the_order_of_the_bytes() -> None:
    shuffled = dict(reversed(entries().items()))

    columns = header_columns(spelled(shuffled))

    assert columns is not None
    assert columns.begins == [0, 24, 34, 42]
    assert columns.names == ["b", "a.weight", "scalar", "empty"]
    assert columns.shapes == [(2, 3), (5,), (), (0, 7)]


VALID = spelled({"__metadata__": {"format": "pt"}, **entries()})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"b":', b'"a.weight":'),
        (b'"b":', b'"__metadata__":'),
        (b'"b":', b'"\\u0062":'),
        (b'"b":', b'"b" :'),
        (b'"b":{', b'"c":{"b":{'),
        (b'{"format":"pt"},', b'{"format":"pt",'),
        (b'"__metadata__":{"format":"pt"},', b'"other":{"format":"pt"},'),
        (b'"__metadata__":{"format":"pt"},', b'"__metadata__":{},"__metadata__":{},'),
        (b'"__metadata__":{"format":"pt"},', b","),
        (b"[2,3]", b"[3,3]"),
        (b"[2,3]", b"[02,3]"),
        (b"[2,3]", b"[2,-3]"),
        (b"[2,3]", b"[2.0,3]"),
        (b"[2,3]", b"[2,3,]"),
        (b"[2,3]", b"[1,1,1,1,1,1,1,2,3]"),
        (b"[0,7]", b"[0,9223372036854775808]"),
        (b"[0,7]", b"[9000000000000000,9000000000000000,0]"),
        (b'"F32"', b'"F33"'),
        (b'"F32"', b'"F4"'),
        (b"[0,24]", b"[1,25]"),
        (b"[24,34]", b"[25,35]"),
        (b"[24,34]", b"[23,33]"),
        (b'},"scalar"', b'}"scalar"'),
        (b'},"scalar"', b'},,"scalar"'),
        (b'},"scalar"', b'},\n"scalar"'),
        (b'"scalar"', b'"sca\xfflar"'),
        (b'"dtype":"I64"', b'"dtype":"I64","more":1'),
    ],
)
def test_unusual_or_unsound_header_is_left_to_the_checks_of_each_object(old: bytes, new: bytes) -> None:
    assert VALID.count(old) == 1
    assert header_columns(VALID) is not None

    assert header_columns(VALID.replace(old, new)) is None


def outcome(path: Path) -> object:
    """What reading says: everything of the file, or the error's message."""
    safetensors_reader._last = None
    try:
        file = read_header(path)
    except LoraToolsError as error:
        return type(error), error.message
    return list(file.tensors.items()), file.metadata, file.data_offset


def test_both_ways_of_reading_say_the_same_of_damaged_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(7)
    path = tmp_path / "damaged.safetensors"
    pieces = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"0", b"1", b"-", b"b", b'"b":', b'"w":{', b"},"]
    accepted = 0
    for _ in range(1500):
        header = bytearray(VALID)
        for _ in range(numbers.randint(0, 2)):
            start = numbers.randrange(len(header))
            header[start : start + numbers.randint(0, 4)] = numbers.choice(pieces)
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(numbers.choice([42, 42, 42, 41, 50])))
        fast = outcome(path)
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_reader, "header_columns", lambda header: None)
            slow = outcome(path)
        assert fast == slow, bytes(header)
        accepted += isinstance(fast, tuple) and len(fast) == 3

    # Neither all sound nor all broken.
    assert 300 < accepted < 1200
