"""Strict reading of untrusted JSON: text that two parsers could read in two ways is refused.

Python's own reader keeps the last of two equal keys, accepts NaN and infinities, and fails on deep nesting with errors
of its own. Here each of these is a `FormatError` that names the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from loratools.errors import FormatError
from loratools.storage import system
from loratools.storage.files import identify, machine_error, quoted, read_bytes, write_at
from loratools.tensors.files import ByteRange

# The longest integer that could mean anything in a header or a configuration: 2^64 has 20 digits.
_MOST_DIGITS = 20
# Every digit as 0 and everything else as a space: a long number is then a run of zeros, which C code finds.
_DIGITS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord(" ") for byte in range(256))
# No header or configuration nests further than a tenth of this.
_DEEPEST = 100


def read_json(path: Path, *, max_bytes: int = 1_000_000, infinities: bool = False) -> dict[str, object]:
    """The object in a JSON file, with finite numbers only; `infinities` also takes Infinity, -Infinity and NaN, which
    Python writes where JSON has no word, and which configs of some models hold.

    Raises:
        FormatError: Too large, not UTF-8, not JSON, a key twice, a number that is not finite, or not an object.
    """
    file = identify(path)
    if file.size > max_bytes:
        raise FormatError(
            f"{quoted(path)} has {file.size:,} bytes; a JSON file here has at most {max_bytes:,}",
            hint="this is some other file under that name",
            defect="container-json",
        )
    data = read_bytes(ByteRange(file, 0, file.size))
    value = parse_json(data.removeprefix(b"\xef\xbb\xbf"), quoted(path), infinities=infinities)
    if not isinstance(value, dict):
        raise FormatError(f"{quoted(path)} holds {kind_of(value)}; an object is needed", defect="container-json")
    return value


def write_json(path: Path, value: object, *, sort: bool = False) -> None:
    """Write a new file: indented by 2, a newline at the end, flushed to disk. A file that is there is replaced."""
    text = json.dumps(value, indent=2, sort_keys=sort, allow_nan=False) + "\n"
    try:
        system.remove_file(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise machine_error(error, "replace", path) from error
    write_new(path, text.encode("utf-8"))


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and flush it to disk."""
    try:
        fd = system.create(path)
        try:
            write_at(fd, data, 0, path=path)
            system.fsync(fd)
        finally:
            system.close(fd)
    except OSError as error:
        raise machine_error(error, "write", path) from error


def parse_json(data: bytes, subject: str, *, infinities: bool = False) -> object:
    """Parse strictly; `subject` begins the error messages.

    Raises:
        FormatError: Not UTF-8, not JSON, a key twice, a number that is not finite, or nested too deeply.
    """
    try:
        text = data.decode("utf-8")
        plain = not infinities and not _has_unusual_integers(data) and not any(gap in data for gap in _GAPS)
        decoder = _lenient if infinities else _plain_decoder if plain else _decoder
        value = decoder.decode(text)
        keys = _count_keys(value)
        if plain and keys != data.count(b'":'):
            value = _decoder.decode(text)
        return value
    except _Refused as refused:
        raise FormatError(f"{subject} {refused}", defect=refused.defect) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{subject} is not UTF-8 at byte {error.start}", defect="container-json") from error
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{subject} is not JSON: {error.msg.lower()} at character {error.pos}", defect="container-json"
        ) from error
    except RecursionError as error:
        raise FormatError(f"{subject} is nested too deeply", defect="container-json") from error


def kind_of(value: object) -> str:
    """What JSON calls a value, with its article."""
    kinds: tuple[tuple[type, str], ...] = (
        (type(None), "null"), (bool, "true or false"), (str, "a text"), (int, "a number"), (float, "a number"),
        (list, "a list"), (dict, "an object"),
    )  # fmt: skip
    return next(name for kind, name in kinds if isinstance(value, kind))


def _count_keys(value: object) -> int:
    """The keys in a value. A value nested so deeply that copying it would exhaust the stack is refused."""
    count = 0
    objects: list[dict[str, object]] = [value] if type(value) is dict else []
    lists: list[list[object]] = [value] if type(value) is list else []
    for _ in range(_DEEPEST):
        if not objects and not lists:
            return count
        count += sum(map(len, objects))
        # The parser makes no subclasses of these two.
        inner = [each for outer in objects for each in outer.values() if type(each) is dict or type(each) is list]
        inner += [each for outer in lists for each in outer if type(each) is dict or type(each) is list]
        objects = [each for each in inner if type(each) is dict]
        lists = [each for each in inner if type(each) is list]
    raise _Refused("is nested too deeply")


class _Refused(Exception):  # noqa: N818 (never leaves this file)
    """Valid for Python's parser, not for us. `defect` as in `LoraToolsError`."""

    def __init__(self, message: str, defect: str = "container-json") -> None:
        super().__init__(message)
        self.defect = defect


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"has the key {quoted(twice)} twice", "container-duplicate-key")
    return members


def _constant(text: str) -> object:
    raise _Refused(f"has the value {text}, which is not JSON")


def _has_unusual_integers(data: bytes) -> bool:
    """Whether a number may be in the text that `_integer` does not leave to `int`. False for almost every file.

    A header of 90,000 tensors has four times as many integers, and calling Python for each takes as long as the rest.
    """
    return b"-0" in data or b"0" * (_MOST_DIGITS + 1) in data.translate(_DIGITS)


def _integer(digits: str) -> int | float:
    # As a float where it is beyond every use, before int() spends quadratic time on it. Also "-0", which is no count.
    if len(digits) > _MOST_DIGITS or digits == "-0":
        return _float(digits)
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused("has a number too large to be read")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
# Keys are counted in place of a call of Python for each object, of which a header of 90,000 tensors has as many: where
# no colon has white space before it, every key ends with a quote and a colon side by side. If the value has as many
# keys as there are of these, whatever texts hold, none was there twice; otherwise the text is parsed again.
_plain_decoder = json.JSONDecoder(parse_constant=_constant, parse_float=_float)
_GAPS = (b" :", b"\t:", b"\n:", b"\r:")
_lenient = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)
