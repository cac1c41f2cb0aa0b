"""Writer of GGUF files, version 3, little-endian: a few keys and plain tensors, in the caller's order.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shapes are given as numpy has them and stored from
the axis that runs fastest. The same input gives the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loratools.errors import UnsupportedError
from loratools.storage import system
from loratools.storage.commit import rewritten_file
from loratools.storage.files import copy_range, machine_error, quoted, reserve, write_at
from loratools.storage.gguf_reader import PLAIN_TYPES
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 32
Field: TypeAlias = str | int | float | tuple[int, ...]
_TYPES = {dtype: kind for kind, dtype in PLAIN_TYPES.items()}


def write_gguf(path: Path, fields: Mapping[str, Field], tensors: Mapping[str, LazyTensor]) -> None:
    """Write one file that appears complete or not at all. Whole numbers become uint32, others float32, tuples
    arrays of uint32.

    Raises:
        UnsupportedError: a dtype that GGUF has no type for.
        MachineError: the disk is full or failed.
    """
    header, offsets = _header(fields, tensors)
    with rewritten_file(path) as staged:
        try:
            fd = system.create(staged)
        except OSError as error:
            raise machine_error(error, "create", staged) from error
        try:
            # The last tensor is filled up too, as the others are; what is not written is zeros.
            padded = sum(t.nbytes + -t.nbytes % _ALIGNMENT for t in tensors.values())
            reserve(fd, len(header) + padded, path)
            write_at(fd, header, 0, path=path)
            for name, tensor in tensors.items():
                if tensor.location is not None:
                    copy_range(tensor.location, fd, offsets[name], path=path)
                else:
                    write_at(fd, _bytes_of(tensor.read()), offsets[name], path=path)
            try:
                system.fsync(fd)
            except OSError as error:
                raise machine_error(error, "write", path) from error
        finally:
            system.close(fd)


def _header(fields: Mapping[str, Field], tensors: Mapping[str, LazyTensor]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, padded, and where each tensor begins in the file."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        parts += [_text(key), _value(value)]
    relative: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise UnsupportedError(f"{quoted(name)} is {tensor.dtype}, which GGUF has no type for")
        shape = tensor.shape[::-1]
        relative[name] = end
        parts.append(_text(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _TYPES[tensor.dtype], end))
        end += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    header = b"".join(parts)
    header += bytes(-len(header) % _ALIGNMENT)
    return header, {name: len(header) + offset for name, offset in relative.items()}


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
