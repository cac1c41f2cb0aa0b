"""Damages to files that keep their structure well enough to be parsed further than a flipped bit would be.

Each takes the bytes of a sound file and a source of randomness, and gives other bytes.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

# What stands in the place of a value of JSON: each type, the ends of ranges, names that mean something elsewhere.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "0", "F32", "F4", "BF16", "I64", "LORA", "LOHA", "OFT", "none", "\ud800", "../../x", "(a+)+$", "a" * 5000,
    [], [[]], [0], [-1], [2**62, 2**62], [1] * 300, {}, {"": {}}, {"default": None}, [None], ["q_proj"], {"q_proj": 0},
)  # fmt: skip
NUMBERS = (0, 1, 2, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bytes are others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def repeated(data: bytes, rng: random.Random) -> bytes:
    """A piece stands twice, or is gone."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 4, 8, 64, 512)))
    return data[:start] + data[start:stop] * rng.choice((0, 2, 2, 9)) + data[stop:]


def number_replaced(data: bytes, rng: random.Random) -> bytes:
    """A number of 1 to 8 bytes, at any place of the first kilobyte or the last, is one at the end of its range."""
    width = rng.choice((1, 2, 4, 8))
    places = [rng.randrange(min(len(data), 1024)), max(0, len(data) - rng.randrange(1, 200))]
    start = rng.choice(places)
    number = rng.choice(NUMBERS) % (1 << (8 * width))
    return data[:start] + number.to_bytes(width, "little") + data[start + width :]


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with one of its values, at any depth, replaced, removed, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {str(rng.choice(VALUES)): value[key]}
            case 2:
                return value | {key + rng.choice(("", ".", ".weight", "\x00", "0")): rng.choice(VALUES)}
            case _:
                return value | {key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return value[:place] + [_changed(value[place], rng)] * rng.choice((0, 1, 1, 1, 2)) + value[place + 1 :]
    return rng.choice(VALUES)


def json_changed(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed(value, rng)
    return json.dumps(value).encode("ascii", "backslashreplace")


def header_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: the length before it is right, so that the header itself is judged."""
    (length,) = struct.unpack_from("<Q", data)
    header = json_changed(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def member_changed(data: bytes, rng: random.Random) -> bytes:
    """A zip archive, one of whose members was damaged before it was packed: sums and lengths are right."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(packed, "w") as changed:
        names = archive.namelist()
        chosen = rng.choice([name for name in names if "data.pkl" in name] or names)
        for name in names:
            content = archive.read(name)
            if name == chosen and content:
                content = rng.choice((flipped, cut, repeated, number_replaced))(content, rng)
            changed.writestr(name if rng.random() > 0.02 else "../" + name, content)
    return packed.getvalue()


ANY: tuple[Mutation, ...] = (flipped, cut, repeated, number_replaced)
