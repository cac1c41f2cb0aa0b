"""Strict reader of GGUF headers: keys with their values, and the place of each tensor. Needs neither numpy nor gguf.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Shapes are given
here as numpy has them: GGUF counts axes from the one that runs fastest. Of quantised types only Q8_0 is decoded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import FormatError, UnsupportedError
from loratools.hints import DAMAGED
from loratools.short_repr import one_line
from loratools.storage.files import identify, quoted, read_bytes, read_into
from loratools.storage.sniff import describe
from loratools.storage.stored import StoredTensor
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.files import ByteRange, FileId
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20
_MAX_TEXT = 64 << 20
_MAX_COUNT = 1 << 28
_MAX_AXES = 4
_MAX_NESTING = 4
# How to unpack a value, by the number of its type.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# ggml types of plain numbers, by their number.
PLAIN_TYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_Q8_0, _Q8_0_BLOCK, _Q8_0_BYTES = 8, 32, 34
# ggml types whose values are packed in blocks, by their number: name, values and bytes of a block.
BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

_TYPE_NAMES = {**PLAIN_TYPES, **{kind: name for kind, (name, _, _) in BLOCK_TYPES.items()}}


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file and its tensors, unread.

    `fields` are the keys of the header; `quantised` names the tensors that cannot be read, with their types.

    `decoded` names the tensors stored as Q8_0 and read as float32. `packed` has the bytes of all tensors stored in
    blocks, including Q8_0. `order` has the names of all tensors in the order of the header, and `layout` is what
    another file needs to have the same header.
    """

    file: FileId
    fields: Mapping[str, object]
    tensors: Mapping[str, LazyTensor]
    quantised: Mapping[str, str]
    decoded: tuple[str, ...]
    packed: Mapping[str, LazyTensor]
    order: tuple[str, ...]
    layout: GgufHeader


@dataclass(frozen=True)
class GgufHeader:
    """The stored header of a GGUF file: its keys as bytes, so that another file can have the same ones.

    Attributes:
        version: The version of the format.
        alignment: Every tensor begins at a multiple of this number of bytes, counted from the first tensor.
        keys: The place of each key in the file, with its value, in file order.
        types: The ggml type of each tensor, by name.
    """

    version: int
    alignment: int
    keys: Mapping[str, ByteRange]
    types: Mapping[str, str]

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class BlockTensor(StoredTensor):
    """Source of the bytes of a tensor whose values are packed in blocks along its last axis.

    kind      the ggml type
    logical   the shape of the values; that of the bytes differs in its last axis
    """

    kind: str = ""
    logical: tuple[int, ...] = ()


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file. No values are read.

    Raises:
        UsageError: The file does not exist.
        UnsupportedError: The file has another version or byte order.
        FormatError: It is not a GGUF file, or a damaged one.
    """
    file = identify(path)
    header = _Header(file)
    if header.take(4) != b"GGUF":
        sniffed = describe(read_bytes(ByteRange(file, 0, min(file.size, 1024))))
        actual_kind = f"but {sniffed.kind}" if sniffed else "by its first bytes"
        raise FormatError(f"{quoted(path)} is not a GGUF file {actual_kind}", hint=sniffed.hint if sniffed else DAMAGED)
    version = header.number("I")
    if version not in (2, 3):
        big = version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
        raise UnsupportedError(
            f"{quoted(path)} is {'a big-endian GGUF file' if big else f'a GGUF file of version {version}'}; "
            "versions 2 and 3, little-endian, are read",
            hint="convert it with llama.cpp first",
        )
    count, keys = header.count(), header.count()
    fields: dict[str, object] = {}
    spans: dict[str, ByteRange] = {}
    for _ in range(keys):
        begin = header.position
        key = header.text()
        if key in fields:
            raise FormatError(f"{quoted(path)} has the key {quoted(key)} twice", hint=DAMAGED)
        fields[key] = header.value(header.number("I"))
        spans[key] = ByteRange(file, begin, header.position - begin)
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise FormatError(f"{quoted(path)} declares an alignment of {alignment}", hint=DAMAGED)
    infos = [header.tensor() for _ in range(count)]
    types = {info.name: _TYPE_NAMES.get(info.kind, f"type {info.kind}") for info in infos}
    data = header.position + -header.position % alignment
    return _tensors(file, fields, infos, data, GgufHeader(version, alignment, spans, types))


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """The header, read from front to back."""

    def __init__(self, file: FileId) -> None:
        self.file = file
        self.position = 0
        self._start = 0
        self._bytes = b""

    def take(self, count: int) -> bytes:
        if self.position + count > self.file.size:
            raise FormatError(f"{quoted(self.file.path)} is cut off in its header", hint=DAMAGED)
        begin = self.position - self._start
        if begin + count > len(self._bytes):
            self._start = self.position
            size = min(max(count, _BLOCK), self.file.size - self.position)
            self._bytes = read_bytes(ByteRange(self.file, self.position, size))
            begin = 0
        self.position += count
        return self._bytes[begin : begin + count]

    def number(self, code: str) -> int:
        value = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return int(value)

    def count(self) -> int:
        count = self.number("Q")
        # Every counted item takes at least a byte.
        if count > min(_MAX_COUNT, self.file.size):
            raise FormatError(f"{quoted(self.file.path)} declares a count of {count:,}", hint=DAMAGED)
        return count

    def text(self) -> str:
        length = self.number("Q")
        if length > min(_MAX_TEXT, self.file.size):
            raise FormatError(f"{quoted(self.file.path)} declares a text of {length:,} bytes", hint=DAMAGED)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{quoted(self.file.path)} has a text that is not UTF-8", hint=DAMAGED) from error

    def value(self, kind: int, depth: int = 0) -> object:
        if kind in _VALUES:
            code = _VALUES[kind]
            return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or depth >= _MAX_NESTING:
            raise FormatError(f"{quoted(self.file.path)} has a value of the unknown type {kind}", hint=DAMAGED)
        inner, count = self.number("I"), self.count()
        if inner in _VALUES:
            code = f"<{count}{_VALUES[inner]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor(self) -> _Info:
        name = self.text()
        axes = self.number("I")
        if axes > _MAX_AXES:
            raise FormatError(f"tensor {quoted(name)} of {quoted(self.file.path)} has {axes} axes", hint=DAMAGED)
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        if math.prod(shape) > 1 << 48:
            raise FormatError(
                f"tensor {quoted(name)} of {quoted(self.file.path)} has shape {list(shape)}", hint=DAMAGED
            )
        kind = self.number("I")
        return _Info(name, shape, kind, self.number("Q"))


def _tensors(file: FileId, fields: Mapping[str, object], infos: list[_Info], data: int, layout: GgufHeader) -> GgufFile:
    tensors: dict[str, LazyTensor] = {}
    quantised: dict[str, str] = {}
    decoded: list[str] = []
    packed: dict[str, LazyTensor] = {}
    end, last = data, None
    for info in sorted(infos, key=lambda i: i.offset):
        subject = f"tensor {quoted(info.name)} of {quoted(file.path)}"
        if info.name in tensors or info.name in quantised:
            raise FormatError(f"{subject} is there twice", hint=DAMAGED)
        start = data + info.offset
        if info.offset % layout.alignment or start < end:
            overlap = f"overlaps {quoted(last)}" if start < end and last else f"begins at byte {start:,}"
            raise FormatError(f"{subject} {overlap}", hint=DAMAGED)
        last, end = info.name, start
        if info.kind in PLAIN_TYPES:
            dtype = PLAIN_TYPES[info.kind]
            nbytes = math.prod(info.shape) * DTYPE_BITS[dtype] // 8
            location = ByteRange(file, start, nbytes)
            tensors[info.name] = LazyTensor(info.shape, dtype, StoredTensor(location, info.shape, dtype))
        elif info.kind == _Q8_0:
            if len(info.shape) < 2 or info.shape[-1] % _Q8_0_BLOCK:
                raise FormatError(
                    f"{subject} is Q8_0 of shape {list(info.shape)}, no whole number of blocks", hint=DAMAGED
                )
            nbytes = math.prod(info.shape) // _Q8_0_BLOCK * _Q8_0_BYTES
            tensors[info.name] = LazyTensor(info.shape, "F32", _EightBit(ByteRange(file, start, nbytes), info.shape))
            decoded.append(info.name)
            packed[info.name] = _blocks(info, file, start, subject)
        elif info.kind in BLOCK_TYPES:
            packed[info.name] = _blocks(info, file, start, subject)
            quantised[info.name] = BLOCK_TYPES[info.kind][0]
            nbytes = packed[info.name].nbytes
        else:
            quantised[info.name] = f"type {info.kind}"
            nbytes = 0
        end = start + nbytes
        if end > file.size:
            raise FormatError(f"{quoted(file.path)} is cut off in {subject.partition(' of ')[0]}", hint=DAMAGED)
    return GgufFile(
        file, fields, tensors, quantised, tuple(decoded), packed, tuple(info.name for info in infos), layout
    )


def _blocks(info: _Info, file: FileId, start: int, subject: str) -> LazyTensor:
    """The bytes of a tensor in blocks, (..., bytes of a row)."""
    kind, values, size = BLOCK_TYPES[info.kind]
    if not info.shape or info.shape[-1] % values:
        raise FormatError(f"{subject} is {kind} of shape {list(info.shape)}, no whole number of blocks", hint=DAMAGED)
    shape = (*info.shape[:-1], info.shape[-1] // values * size)
    return LazyTensor(shape, "U8", BlockTensor(ByteRange(file, start, math.prod(shape)), shape, "U8", kind, info.shape))


@dataclass(frozen=True)
class _EightBit:
    """Source of a tensor stored as Q8_0: blocks of 32 along the last axis, each a float16 scale and 32 int8."""

    span: ByteRange
    shape: tuple[int, ...]

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        rows, *inner = self.shape
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {rows}")
        row_bytes = math.prod(inner) // _Q8_0_BLOCK * _Q8_0_BYTES
        packed = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        read_into(self.span, start * row_bytes, packed.numpy().data)
        blocks = packed.reshape(-1, _Q8_0_BYTES)
        scales = blocks[:, :2].contiguous().view(torch.float16).float()
        return (blocks[:, 2:].contiguous().view(torch.int8).float() * scales).reshape(stop - start, *inner)

    def scalar(self) -> float:
        raise UnsupportedError("a block of Q8_0 is no scalar")
