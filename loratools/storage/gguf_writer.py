"""Writer of GGUF files, little-endian: keys and tensors in the caller's order.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shapes are given as numpy has them and stored from
the axis that runs fastest. The same input gives the same bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loratools.errors import UnsupportedError
from loratools.storage.checksum import Checksum
from loratools.storage.files import copy_range, quoted, write_at
from loratools.storage.gguf_reader import BLOCK_TYPES, PLAIN_TYPES
from loratools.storage.streamed_file import FileLayout, StreamedFile
from loratools.storage.written_tensors import file_of_output
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 3
_ALIGNMENT = 32
Field: TypeAlias = str | int | float | tuple[int, ...]
_TYPES = {dtype: kind for kind, dtype in PLAIN_TYPES.items()}
_TYPES |= {name: kind for kind, (name, _, _) in BLOCK_TYPES.items()}
_BLOCKS = {name: (values, size) for name, values, size in BLOCK_TYPES.values()}


@dataclass(frozen=True)
class GgufSpec:
    """A tensor of a GGUF file: its name, its ggml type by name, and the shape of its values, as numpy has it."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes its values take."""
        elements = math.prod(self.shape)
        if self.kind in _BLOCKS:
            values, size = _BLOCKS[self.kind]
            return elements // values * size
        return elements * DTYPE_BITS[self.kind] // 8


def key_bytes(key: str, value: Field) -> bytes:
    """A key of the header with its value: whole numbers as uint32, others as float32, tuples as arrays of uint32."""
    return _text(key) + _value(value)


def gguf_layout(
    keys: Sequence[bytes], specs: Sequence[GgufSpec], *, version: int = _VERSION, alignment: int = _ALIGNMENT
) -> FileLayout:
    """Lay out tensors in the given order, after the keys, each of which is given as its bytes in the file.

    Raises:
        UnsupportedError: A type that GGUF does not have.
    """
    parts = [b"GGUF", struct.pack("<IQQ", version, len(specs), len(keys)), *keys]
    relative: dict[str, int] = {}
    end = 0
    for spec in specs:
        if spec.kind not in _TYPES:
            raise UnsupportedError(f"{quoted(spec.name)} is {spec.kind}, which GGUF has no type for")
        shape = spec.shape[::-1]
        relative[spec.name] = end
        parts.append(_text(spec.name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPES[spec.kind], end))
        # The last tensor is filled up too, as the others are; what is not written is zeros.
        end += spec.nbytes + -spec.nbytes % alignment
    header = b"".join(parts)
    header += bytes(-len(header) % alignment)
    return FileLayout(header, {name: len(header) + offset for name, offset in relative.items()}, len(header) + end)


def write_gguf(path: Path, fields: Mapping[str, Field], tensors: Mapping[str, LazyTensor]) -> None:
    """Write one file that appears complete or not at all. Whole numbers become uint32, others float32, tuples
    arrays of uint32.

    Raises:
        UnsupportedError: A dtype that GGUF has no type for.
        MachineError: The disk is full or failed.
    """
    specs = [GgufSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    keys = [key_bytes(key, value) for key, value in fields.items()]
    layout = gguf_layout(keys, specs)
    sizes = {spec.name: spec.nbytes for spec in specs}
    with file_of_output(path) as (staged, noted), StreamedFile(staged, layout, sizes, keep=noted is not None) as file:
        for name, tensor in tensors.items():
            if tensor.location is not None:
                with file.opened() as fd:
                    copy_range(tensor.location, fd, file.offset(name), path=path)
                file.account(name, 0, tensor.nbytes)
            elif noted is None:
                _write_values(file, name, tensor, path, None)
            else:
                noted.write_once(file, name, partial(_write_values, file, name, tensor, path))


def _write_values(file: StreamedFile, name: str, tensor: LazyTensor, path: Path, checksum: Checksum | None) -> None:
    """Write a tensor whose bytes are in no file, and add them to a checksum; `path` is for error messages."""
    data = _bytes_of(tensor.read())
    with file.opened() as fd:
        write_at(fd, data, file.offset(name), path=path)
    if checksum is not None:
        checksum.add(data)
    file.account(name, 0, tensor.nbytes)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Field) -> bytes:
    if isinstance(value, tuple):
        return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
