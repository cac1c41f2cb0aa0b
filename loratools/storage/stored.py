"""StoredTensor: a tensor whose bytes lie in one piece in a file, little-endian and row-major."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError
from loratools.storage.files import quoted, read_bytes, read_into, reading
from loratools.tensors.dtypes import DTYPE_BITS, FLOAT8_DTYPES, decode_float8, torch_dtype
from loratools.tensors.files import ByteRange, FileId
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as TorchDtype

_STRUCT = {
    "BOOL": "?", "U8": "B", "I8": "b", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q",
    "F16": "e", "F32": "f", "F64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Source of a tensor that is exactly the bytes of `location`."""

    location: ByteRange
    shape: tuple[int, ...]
    dtype: str

    def __hash__(self) -> int:
        # Of tensors with values, no two that are alike in these have different places.
        location = self.location
        return hash((location.file.inode, location.offset))

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the first axis.

        Raises:
            UnsupportedError: torch has no such dtype; the bytes can still be copied.
            ChangedInputError: The file is not what it was.
        """
        import torch

        dtype = readable_dtype(self.dtype, self.location.file)
        rows, *inner = self.shape or (1,)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {rows}")
        row_bytes = self.location.nbytes // rows if rows else 0
        # Not a bytearray: zeroing it first costs a pass over the memory, and holds the interpreter's lock.
        values = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        read_into(self.location, start * row_bytes, values.numpy().data)
        return values.view(dtype).reshape(stop - start, *inner)

    def scalar(self) -> float:
        return decode_scalar(read_bytes(self.location), self.dtype, self.location.file)


@dataclass(frozen=True)
class StridedTensor:
    """Source of a view of `span`, transposed, cut out or repeated: element i, j is i * strides[0] + j * strides[1]."""

    span: ByteRange
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the first axis.

        Raises:
            UnsupportedError: torch has no such dtype.
            ChangedInputError: The file is not what it was.
        """
        import torch

        dtype = readable_dtype(self.dtype, self.span.file)
        shape = (stop - start, *self.shape[1:])
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {self.shape[0]}")
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        width = DTYPE_BITS[self.dtype] // 8
        elements = 1 + sum((n - 1) * step for n, step in zip(shape, self.strides, strict=True))
        values = torch.empty(elements * width, dtype=torch.uint8)
        read_into(self.span, start * self.strides[0] * width, values.numpy().data)
        return values.view(dtype).as_strided(shape, self.strides).clone(memory_format=torch.contiguous_format)

    def scalar(self) -> float:
        return decode_scalar(read_bytes(self.span), self.dtype, self.span.file)


def stored(file: FileId, offset: int, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """A contiguous tensor at byte `offset` of the file."""
    nbytes = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
    return LazyTensor(shape, dtype, StoredTensor(ByteRange(file, offset, nbytes), shape, dtype))


def readable_dtype(dtype: str, file: FileId) -> TorchDtype:
    """The torch dtype to read values in.

    Raises:
        UnsupportedError: There is none: packed formats of less than a byte, or a torch too old for this one.
    """
    try:
        return torch_dtype(dtype)
    except (KeyError, AttributeError) as error:
        raise UnsupportedError(
            f"{quoted(file.path)} has values of dtype {dtype}, which torch cannot compute with",
            hint="such tensors can be listed and copied, not computed with; a newer torch may know more of them",
        ) from error


def scalars(tensors: Iterable[LazyTensor]) -> list[float]:
    """The values of one-element tensors; of those in one file with one look at the file, and not with one for each."""
    tensors = list(tensors)
    values: list[float] = []
    for file, of_file in groupby(tensors, key=lambda tensor: tensor.location and tensor.location.file):
        if file is None:
            values += [tensor.scalar() for tensor in of_file]
            continue
        with reading(ByteRange(file, 0, file.size)) as read:
            for tensor in of_file:
                location = tensor.location
                assert location is not None, "it has a file"
                data = bytearray(location.nbytes)
                read(location.offset, memoryview(data))
                values.append(decode_scalar(bytes(data), tensor.dtype, file))
    return values


def decode_scalar(data: bytes, dtype: str, file: FileId) -> float:
    """The value of one element, without torch."""
    if dtype in _STRUCT:
        return float(struct.unpack(f"<{_STRUCT[dtype]}", data)[0])
    if dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype == "F8_E8M0":
        return math.ldexp(1.0, data[0] - 127) if data[0] != 255 else math.nan
    if dtype in FLOAT8_DTYPES:
        return decode_float8(data[0], dtype)
    raise UnsupportedError(f"{quoted(file.path)} has a scalar of dtype {dtype}, which is no number that can be used")
