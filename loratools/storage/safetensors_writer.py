"""Writer of safetensors files: the whole layout is known before the first byte, tensors arrive in any order.

Order of tensors and of metadata is the caller's, so the same input gives the same bytes, and a merged shard has the
layout of its base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import InputError
from loratools.storage.checksum import Checksum
from loratools.storage.files import copy_range, quoted, start_writeback, write_at
from loratools.storage.safetensors_reader import MAX_HEADER
from loratools.storage.streamed_file import FileLayout, StreamedFile
from loratools.storage.written_tensors import file_of_output
from loratools.tensors.dtypes import DTYPE_BITS, dtype_name
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

# Larger tensors that are not in a file as they are come and go in row blocks of this size. Not smaller: a transposed
# view reads its whole tensor for each block.
_BLOCK = 256 << 20


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Lay out tensors in the given order.

    Raises:
        InputError: Names or metadata that the format cannot hold.
    """
    entries = [f'"__metadata__":{_spelled(dict(metadata))}'] if metadata else []
    begins: dict[str, int] = {}
    # Of the tensors of one dtype and shape, how the entry begins and how many bytes it has.
    kinds: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
    end = 0
    for spec in specs:
        name, kind = spec.name, (spec.dtype, spec.shape)
        if name in begins or name == "__metadata__":
            raise InputError(f"a safetensors file cannot hold two tensors named {quoted(name)}")
        if kind not in kinds:
            dtype_and_shape = _spelled({"dtype": spec.dtype, "shape": list(spec.shape)})
            kinds[kind] = f'{dtype_and_shape[:-1]},"data_offsets":[', spec.nbytes
        head, nbytes = kinds[kind]
        begins[name] = end
        entries.append(f"{_spelled(name)}:{head}{end},{end + nbytes}]}}")
        end += nbytes
    try:
        text = f"{{{','.join(entries)}}}".encode()
    except UnicodeEncodeError as error:
        raise InputError("a safetensors file cannot hold a text with half of a surrogate pair") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError(
            f"the header of a safetensors file would have {len(text):,} bytes; the format allows {MAX_HEADER:,}",
            hint="split the file into shards",
        )
    start = 8 + len(text)
    return FileLayout(
        len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}, start + end
    )


# Like `json.dumps` with these settings, without creating an encoder for each name.
_spelled = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class SafetensorsWriter(StreamedFile):
    """A safetensors file being written, whose tensors are given by value, by rows, or as bytes of another file."""

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str], *, keep: bool = False
    ) -> None:
        """Begin a file; with `keep`, go on with one that is there, where its header and size are those of this one."""
        specs = list(specs)
        self._specs = {spec.name: spec for spec in specs}
        super().__init__(path, layout(specs, metadata), {spec.name: spec.nbytes for spec in specs}, keep=keep)

    def write(self, name: str, tensor: Tensor, checksum: Checksum | None = None) -> None:
        """Write all values of a tensor, and add their bytes to a checksum."""
        if tuple(tensor.shape) != self._specs[name].shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} was announced as {self._specs[name].shape}")
        self._write(name, 0, tensor, checksum)

    def write_rows(self, name: str, start: int, tensor: Tensor, checksum: Checksum | None = None) -> None:
        """Write rows of the first axis, from row `start` on, and add their bytes to a checksum."""
        spec = self._specs[name]
        if tensor.shape[1:] != spec.shape[1:] or start + tensor.shape[0] > spec.shape[0]:
            raise ValueError(f"{name}: rows {start} and on of {tuple(tensor.shape)} do not fit {spec.shape}")
        self._write(name, start * (spec.nbytes // max(spec.shape[0], 1)), tensor, checksum)

    def copy(self, name: str, location: ByteRange) -> None:
        """Copy all bytes of a tensor from another file, unread."""
        if location.nbytes != self._specs[name].nbytes:
            raise ValueError(f"{name}: {location.nbytes} bytes were announced as {self._specs[name].nbytes}")
        with self.opened() as fd:
            copy_range(location, fd, self.offset(name), path=self.path)
        self.account(name, 0, location.nbytes)

    def _write(self, name: str, start: int, tensor: Tensor, checksum: Checksum | None) -> None:
        if dtype_name(tensor.dtype) != self._specs[name].dtype:
            raise ValueError(f"{name}: {tensor.dtype} was announced as {self._specs[name].dtype}")
        data = _bytes_of(tensor)
        with self.opened() as fd:
            write_at(fd, data, self.offset(name) + start, path=self.path)
            start_writeback(fd, self.offset(name) + start, len(data))
        if checksum is not None:
            checksum.add(data)
        self.account(name, start, len(data))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write one file that appears complete or not at all; a file that is there is replaced.

    Tensors that a killed run has written stay as they are, where it noted them (`written_tensors`).
    """
    specs = [_spec(name, tensor) for name, tensor in tensors.items()]
    with (
        file_of_output(path) as (staged, noted),
        SafetensorsWriter(staged, specs, metadata, keep=noted is not None) as writer,
    ):
        for name, tensor in tensors.items():
            if isinstance(tensor, LazyTensor) and tensor.location is not None:
                writer.copy(name, tensor.location)
            elif noted is None:
                _write_values(writer, name, tensor, None)
            else:
                noted.write_once(writer, name, partial(_write_values, writer, name, tensor))


def _write_values(writer: SafetensorsWriter, name: str, tensor: Tensor | LazyTensor, checksum: Checksum | None) -> None:
    """Write a tensor whose bytes are in no file."""
    if not isinstance(tensor, LazyTensor):
        writer.write(name, tensor, checksum)
    elif tensor.nbytes <= _BLOCK:
        writer.write(name, tensor.read(), checksum)
    else:
        rows = max(1, _BLOCK // (tensor.nbytes // tensor.shape[0]))
        for start in range(0, tensor.shape[0], rows):
            block = tensor.read_rows(start, min(start + rows, tensor.shape[0]))
            writer.write_rows(name, start, block, checksum)


def _spec(name: str, tensor: Tensor | LazyTensor) -> TensorSpec:
    dtype = tensor.dtype if isinstance(tensor.dtype, str) else dtype_name(tensor.dtype)
    return TensorSpec(name, dtype, tuple(tensor.shape))


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().data
