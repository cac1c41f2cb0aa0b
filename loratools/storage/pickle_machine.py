"""Runs the program that a pickle is, without the power that makes pickles dangerous.

Python's unpickler imports what a pickle names and calls it. This one builds numbers, texts and containers, and gives
every name, call and reference to a `World`, which knows a handful by heart and refuses the rest. Nothing is imported,
no attribute is set, and size, steps and integers are bounded, so that a few bytes cannot ask for all memory or time.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from loratools.errors import FormatError, LoraToolsError, UnsupportedError
from loratools.hints import DAMAGED
from loratools.storage.files import quoted, read_bytes
from loratools.tensors.files import ByteRange, FileId

_MAX_BYTES = 256 << 20
# A tensor takes about 40 steps, so this is enough for 100,000 of them.
_MAX_STEPS = 5_000_000
_MAX_INTEGER_BYTES = 64
_BLOCK = 1 << 16


class World(Protocol):
    """What a pickle may refer to."""

    def find(self, module: str, name: str) -> object: ...

    def call(self, function: object, arguments: tuple[object, ...]) -> object: ...

    def refer(self, reference: object) -> object: ...


class Machine:
    """Runs pickles that lie one after another in a file, from byte `start` of the range on."""

    def __init__(self, location: ByteRange, world: World) -> None:
        self._stream = _Stream(location)
        self._file = location.file
        self._world = world

    @property
    def position(self) -> int:
        """Where the last pickle ended, from the start of the range."""
        return self._stream.position

    def run(self) -> object:
        """The value of the next pickle.

        Raises:
            UnsupportedError: It names something that is not known to be harmless.
            FormatError: It is damaged, or built to exhaust memory or time.
        """
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        take, table = self._stream.take, _TABLE
        try:
            for _ in range(_MAX_STEPS):
                code = take(1)[0]
                if code == _STOP:
                    return self._stack.pop()
                step = table.get(code)
                if step is None:
                    raise UnsupportedError(
                        f"the pickle {quoted(self._file.path)} uses opcode {code:#04x} at byte {self.position - 1:,}, "
                        "which no file of tensors needs",
                        hint=HINT,
                    )
                step(self)
        except LoraToolsError:
            raise
        # Each step takes its operands for granted: what a sound pickle cannot do ends as one of these.
        except (
            IndexError,
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            OverflowError,
            struct.error,
            RecursionError,
        ) as error:
            raise FormatError(
                f"{quoted(self._file.path)} is damaged: the pickle makes no sense at byte {self.position:,}",
                hint=DAMAGED,
            ) from error
        raise FormatError(
            f"the pickle {quoted(self._file.path)} takes more than {_MAX_STEPS:,} steps; no file of tensors does",
            hint="do not trust this file",
        )

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._stream.take(struct.calcsize(layout)))[0]
        return number

    def _data(self, length_layout: str) -> bytes:
        return self._stream.take(self._number(length_layout))

    def _long(self, length_layout: str) -> None:
        data = self._data(length_layout)
        if len(data) > _MAX_INTEGER_BYTES:
            raise ValueError("no count is that large")
        self._push(int.from_bytes(data, "little", signed=True))

    def _decimal(self) -> None:
        text = self._stream.line().rstrip(b"L")
        if len(text) > 2 * _MAX_INTEGER_BYTES:
            raise ValueError("no count is that large")
        # Protocol 0 writes truth values as integers with a leading zero.
        self._push({b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text))

    def _quoted_text(self) -> None:
        text = self._stream.line()
        if len(text) < 2 or text[0] != text[-1] or text[:1] not in b"'\"" or b"\\" in text:
            raise ValueError("not a plain text")
        self._push(text[1:-1].decode("utf-8"))

    def _collect(self, build: Callable[[list[object]], object]) -> None:
        items = self._pop_to_mark()
        self._push(build(items))

    def _tuple(self, count: int) -> None:
        if count > len(self._stack):
            raise IndexError("stack")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _append(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("not a list")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("not a dictionary")
        put_items(target, list(zip(items[::2], items[1::2], strict=True)))

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._push(self._memo[index])

    def _find(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("not a name")
        self._push(self._world.find(module, name))

    def _global(self) -> None:
        module, name = self._stream.line(), self._stream.line()
        self._find(module.decode("utf-8"), name.decode("utf-8"))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._find(module, name)

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("not arguments")
        self._push(self._world.call(function, arguments))

    def _build(self) -> None:
        # State of an object. What we know has none that matters: an OrderedDict of weights carries version numbers.
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise TypeError("only a dictionary may have state")

    def _refer(self, reference: object) -> None:
        self._push(self._world.refer(reference))


class CopyBudget:
    """What calls may copy, in items and characters, of arguments that the pickle can name again at two bytes each.

    A sound pickle has each of them copied once, and so no more than it has bytes.
    """

    def __init__(self, file: FileId) -> None:
        self._file = file
        self._remaining = 4 * min(file.size, _MAX_BYTES) + 10_000

    def spend(self, count: int) -> None:
        """Take `count` off.

        Raises:
            FormatError: Nothing is left.
        """
        self._remaining -= count
        if self._remaining < 0:
            raise FormatError(
                f"the pickle {quoted(self._file.path)} copies its values again and again; no file of tensors does",
                hint="do not trust this file",
            )


HINT = "load it where it can do no harm, save its tensors as safetensors, and give that file"


def put_items(target: dict[object, object], pairs: list[tuple[object, object]]) -> None:
    """Add to a dictionary under keys that are quick to hash: nested tuples and huge integers need not be."""
    for key, value in pairs:
        if not isinstance(key, str | bytes | int | None) or (isinstance(key, int) and abs(key) >= 1 << 60):
            raise TypeError("not a key")
        target[key] = value


class _Stream:
    def __init__(self, location: ByteRange) -> None:
        self._location = location
        self._buffer = b""
        self._start = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def take(self, count: int) -> bytes:
        end = self._at + count
        if count < 0 or end > len(self._buffer):
            self._fill(count)
            end = self._at + count
        data = self._buffer[self._at : end]
        self._at = end
        return data

    def line(self) -> bytes:
        end = self._buffer.find(b"\n", self._at)
        if end < 0:
            self._fill(min(_BLOCK, self._location.nbytes - self.position))
            end = self._buffer.find(b"\n", self._at)
            if end < 0:
                raise ValueError("a line without end")
        data = self._buffer[self._at : end]
        self._at = end + 1
        return data

    def _fill(self, count: int) -> None:
        remaining = self._location.nbytes - self.position
        if count < 0 or count > remaining:
            raise FormatError(
                f"{quoted(self._location.file.path)} is cut off: the pickle in it does not end", hint=DAMAGED
            )
        if self.position + count > _MAX_BYTES:
            raise FormatError(
                f"the pickle {quoted(self._location.file.path)} has more than {_MAX_BYTES:,} bytes besides its tensors",
                hint="do not trust this file",
            )
        self._start, self._at, stop = self.position, 0, self.position + min(remaining, max(count, _BLOCK))
        self._buffer = read_bytes(self._location, self._start, stop)


_STOP = ord(".")
_TABLE: dict[int, Callable[[Machine], None]] = {
    ord(code): step
    for code, step in {
        "(": Machine._mark,
        "0": Machine._pop,
        "1": lambda m: void(m._pop_to_mark()),
        "2": lambda m: m._push(m._stack[-1]),
        "\x80": lambda m: _check_protocol(m._number("<B")),
        "\x95": lambda m: void(m._number("<Q")),
        "N": lambda m: m._push(None),
        "\x88": lambda m: m._push(True),
        "\x89": lambda m: m._push(False),
        "I": Machine._decimal,
        "L": Machine._decimal,
        "J": lambda m: m._push(m._number("<i")),
        "K": lambda m: m._push(m._number("<B")),
        "M": lambda m: m._push(m._number("<H")),
        "\x8a": lambda m: m._long("<B"),
        "\x8b": lambda m: m._long("<i"),
        "F": lambda m: m._push(float(m._stream.line())),
        "G": lambda m: m._push(struct.unpack(">d", m._stream.take(8))[0]),
        "S": Machine._quoted_text,
        "T": lambda m: m._push(m._data("<i").decode("utf-8")),
        "U": lambda m: m._push(m._data("<B").decode("utf-8")),
        "V": lambda m: m._push(m._stream.line().decode("raw_unicode_escape")),
        "X": lambda m: m._push(m._data("<I").decode("utf-8")),
        "\x8c": lambda m: m._push(m._data("<B").decode("utf-8")),
        "\x8d": lambda m: m._push(m._data("<Q").decode("utf-8")),
        "B": lambda m: m._push(m._data("<I")),
        "C": lambda m: m._push(m._data("<B")),
        "\x8e": lambda m: m._push(m._data("<Q")),
        "]": lambda m: m._push([]),
        ")": lambda m: m._push(()),
        "}": lambda m: m._push({}),
        "l": lambda m: m._collect(list),
        "t": lambda m: m._collect(tuple),
        "d": lambda m: m._collect(_dictionary),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "a": lambda m: m._append([m._stack.pop()]),
        "e": lambda m: m._append(m._pop_to_mark()),
        "s": lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),
        "u": lambda m: m._set_items(m._pop_to_mark()),
        "p": lambda m: m._remember(int(m._stream.line())),
        "q": lambda m: m._remember(m._number("<B")),
        "r": lambda m: m._remember(m._number("<I")),
        "\x94": lambda m: m._remember(len(m._memo)),
        "g": lambda m: m._recall(int(m._stream.line())),
        "h": lambda m: m._recall(m._number("<B")),
        "j": lambda m: m._recall(m._number("<I")),
        "c": Machine._global,
        "\x93": Machine._stack_global,
        "R": Machine._call,
        "b": Machine._build,
        "P": lambda m: m._refer(m._stream.line().decode("utf-8")),
        "Q": lambda m: m._refer(m._stack.pop()),
    }.items()
}


def void(_: object) -> None:
    return None


def _dictionary(items: list[object]) -> dict[object, object]:
    items_by_key: dict[object, object] = {}
    put_items(items_by_key, list(zip(items[::2], items[1::2], strict=True)))
    return items_by_key


def _check_protocol(version: int) -> None:
    if version > 5:
        raise ValueError("a protocol from the future")
