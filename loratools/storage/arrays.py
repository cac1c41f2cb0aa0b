"""Values of tensors as numpy arrays, without torch where they lie in a file or are computed by numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard

from loratools.errors import LoraToolsError, UnsupportedError
from loratools.storage.files import quoted, read_into
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor, Source

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.packing import Bytes
    from loratools.algebra.rounding import Floats, Stored


class FloatsSource(Protocol):
    """A source whose values are computed by numpy, so that torch need not be imported for them."""

    def read_floats(self, start: int, stop: int) -> Floats:
        """Rows start:stop of the first axis as float32; exactly the values that `read_rows` gives."""


class StoredSource(Protocol):
    """A source that has its stored numbers in memory, as numpy holds them."""

    def read_stored(self) -> Bytes:
        """All of its bytes, flat."""


# By an attribute of the class: to ask a protocol whether a value is one of it takes longer than to read a small tensor.
def _has_floats(source: Source) -> TypeGuard[FloatsSource]:
    """Whether the values of a source are computed by numpy."""
    return hasattr(type(source), "read_floats")


def _has_stored(source: Source) -> TypeGuard[StoredSource]:
    return hasattr(type(source), "read_stored")


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Source of a tensor whose bytes are in memory: `data`, flat, of uint8."""

    data: Bytes

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_stored(self) -> Bytes:
        return self.data

    def read_rows(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError("its values are read as they are stored, with read_raw")

    def scalar(self) -> float:
        raise NotImplementedError("its values are read as they are stored, with read_raw")


# How numpy holds the numbers of the dtypes that it knows; of float8 and bfloat16 it is given the bits.
_RAW = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E5M2": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1",
    "F8_E5M2FNUZ": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip


def read_array(tensor: LazyTensor, dtype: str, start: int = 0, stop: int | None = None) -> Floats:
    """Rows start:stop (all of a tensor without axes) in `dtype`, F32 or F64; a new array of the tensor's own shape.

    Raises:
        UnsupportedError: The tensor is not of a floating dtype that is computed with.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, widen

    shape = ((tensor.shape[0] if stop is None else stop) - start, *tensor.shape[1:]) if tensor.shape else ()
    out: Floats = np.empty(shape, np.float64 if dtype == "F64" else np.float32)
    if tensor.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"{_described(tensor)} has dtype {tensor.dtype}, which is not computed with",
            hint="convert it to float32 first",
        )
    if tensor.shape and _has_floats(source := tensor.source):
        np.copyto(out, source.read_floats(start, start + shape[0]).reshape(shape))
    elif tensor.location is None:
        values = tensor.read() if not tensor.shape else tensor.read_rows(start, start + shape[0])
        np.copyto(out, (values.double() if dtype == "F64" else values.float()).numpy())
    else:
        stored = np.empty(shape, STORAGE[tensor.dtype])
        row_bytes = math.prod(tensor.shape[1:]) * stored.itemsize
        read_into(tensor.location, start * row_bytes, stored.reshape(-1).view(np.uint8).data)
        widen(stored, tensor.dtype, out)
    return out


def read_raw(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> Stored:
    """Rows start:stop (all of a tensor without axes) as they are stored; of float8 and bfloat16 the bits, as unsigned
    integers. Shape (stop - start, *tensor.shape[1:]), and () where the tensor has no axes.

    Raises:
        UnsupportedError: Values of less than a byte each.
    """
    import numpy as np

    if tensor.dtype not in _RAW:
        raise UnsupportedError(
            f"{_described(tensor)} has dtype {tensor.dtype}, which is not computed with",
            hint="such tensors can be copied",
        )
    shape = ((tensor.shape[0] if stop is None else stop) - start, *tensor.shape[1:]) if tensor.shape else ()
    out: Stored = np.empty(shape, _RAW[tensor.dtype])
    if tensor.location is not None:
        row_bytes = math.prod(tensor.shape[1:]) * out.itemsize
        read_into(tensor.location, start * row_bytes, out.reshape(-1).view(np.uint8).data)
        return out
    if _has_stored(source := tensor.source):
        all_rows: Stored = source.read_stored().view(_RAW[tensor.dtype]).reshape(tensor.shape)
        return all_rows[start : start + shape[0]] if shape else all_rows
    values = tensor.read() if not tensor.shape else tensor.read_rows(start, start + shape[0])
    width = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[out.itemsize]
    import torch

    out[...] = values.contiguous().view(getattr(torch, width)).numpy().view(out.dtype)
    return out


def _described(tensor: LazyTensor) -> str:
    """The tensor by its name and file, which it does not know itself: the header says what lies at its place."""
    from loratools.storage.safetensors_reader import read_header

    if (place := tensor.location) is None:
        return f"a tensor of shape {tensor.shape}"
    try:
        names = [name for name, other in read_header(place.file.path).tensors.items() if other.location == place]
    except LoraToolsError:
        names = []  # a file of another kind
    return f"{quoted(names[0]) if names else 'a tensor'} of {quoted(place.file.path)}"
