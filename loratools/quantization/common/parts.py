"""Stored parts of packed weights: collected by name, and read by rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.quantization.common.protocol import Part
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.packing import Bytes
    from loratools.algebra.rounding import Floats, Stored

# The longest list of settings that is read without numpy: a shape.
_MOST_NUMBERS = 16


def collect(tensors: Mapping[str, LazyTensor], names: Mapping[str, str]) -> tuple[Part, ...]:
    """The stored parts among the possible ones, as role -> stored name, with the packed numbers first."""
    return tuple(Part(role, name, tensors[name]) for role, name in names.items() if name in tensors)


def read_floats(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> Floats:
    """Rows of a numeric tensor as float32: floats of any width, float8, powers of two (E8M0), or integers."""
    import numpy as np

    from loratools.algebra.packing import e8m0, float8_values
    from loratools.storage.arrays import read_array, read_raw
    from loratools.tensors.dtypes import FLOAT8_DTYPES, FLOAT_DTYPES

    if tensor.dtype in FLOAT_DTYPES:
        return read_array(tensor, "F32", start, stop)
    raw = read_raw(tensor, start, stop)
    if tensor.dtype in FLOAT8_DTYPES:
        return float8_values(tensor.dtype)[raw]
    if tensor.dtype == "F8_E8M0":
        return e8m0(raw)
    return raw.astype(np.float32)


def read_groups(tensor: LazyTensor, start: int, stop: int) -> Floats:
    """Numbers of rows start:stop as (rows, groups), in float32; a single number for the tensor as (1, 1)."""
    if tensor.elements == 1:
        return read_floats(tensor).reshape(1, 1)
    return read_floats(tensor, start, stop).reshape(stop - start, -1)


def read_bytes_between(tensor: LazyTensor, start: int, stop: int) -> Bytes:
    """Bytes start:stop of a tensor, whatever its dtype and shape."""
    import numpy as np

    from loratools.storage.arrays import read_raw
    from loratools.storage.files import read_into

    if tensor.location is None:
        return read_raw(tensor).reshape(-1).view(np.uint8)[start:stop]
    data = np.empty(stop - start, np.uint8)
    read_into(tensor.location, start, data.data)
    return data


def read_flat(tensor: LazyTensor, start: int, stop: int) -> Floats:
    """Elements start:stop of a tensor in storage order, as float32; integers as they are."""
    import numpy as np

    from loratools.tensors.views import reshaped

    flat = reshaped(tensor, (tensor.elements,))
    if DTYPE_BITS[tensor.dtype] == 8 and tensor.dtype[0] == "U":
        codes: Floats = read_bytes_between(tensor, start, stop)  # type: ignore[assignment]
        return codes
    values = read_floats(flat, start, stop)
    return np.ascontiguousarray(values)


def read_numbers(tensor: LazyTensor) -> tuple[int, ...]:
    """All integers of a small stored tensor, read without numpy: what a scheme needs before anything is computed.

    Raises:
        ValueError: They are not integers, or there are too many for a shape or a setting.
    """
    import struct

    from loratools.storage.files import read_bytes

    codes = {"U8": "B", "I8": "b", "I16": "h", "I32": "i", "U32": "I", "I64": "q", "BOOL": "?"}
    if tensor.dtype not in codes or tensor.elements > _MOST_NUMBERS:
        raise ValueError(f"{tensor.elements} values of dtype {tensor.dtype}")
    if tensor.location is None:
        return tuple(int(value) for value in tensor.read().reshape(-1).tolist())
    return tuple(map(int, struct.unpack(f"<{tensor.elements}{codes[tensor.dtype]}", read_bytes(tensor.location))))


def read_columns(tensor: LazyTensor, start: int, stop: int) -> Stored:
    """Columns start:stop of a stored matrix: (rows, stop - start)."""
    import numpy as np

    from loratools.storage.arrays import read_raw
    from loratools.storage.files import reading

    if tensor.location is None or (start, stop) == (0, tensor.shape[1]):
        return read_raw(tensor)[:, start:stop]
    first = read_raw(tensor, 0, 1)
    out = np.empty((tensor.shape[0], stop - start), first.dtype)
    width, row_bytes = out.itemsize, first.nbytes
    with reading(tensor.location) as read:
        for row, values in enumerate(out):
            read(row * row_bytes + start * width, values.view(np.uint8).data)
    return out
