"""Values of floating-point tensors as numpy arrays of float32 or float64, without torch where they lie in a file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError
from loratools.storage.files import read_into
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


def read_array(tensor: LazyTensor, dtype: str, start: int = 0, stop: int | None = None) -> Floats:
    """Rows start:stop (all, where it has none) in `dtype`, F32 or F64; a new array of the tensor's own shape.

    Raises:
        UnsupportedError: the tensor is not of a floating dtype that is computed with.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, widen

    shape = ((tensor.shape[0] if stop is None else stop) - start, *tensor.shape[1:]) if tensor.shape else ()
    out: Floats = np.empty(shape, np.float64 if dtype == "F64" else np.float32)
    if tensor.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(f"a tensor of {tensor.dtype} is not computed with", hint="convert it to float32 first")
    if tensor.location is None:
        values = tensor.read() if not tensor.shape else tensor.read_rows(start, start + shape[0])
        np.copyto(out, (values.double() if dtype == "F64" else values.float()).numpy())
    else:
        stored = np.empty(shape, STORAGE[tensor.dtype])
        row_bytes = math.prod(tensor.shape[1:]) * stored.itemsize
        read_into(tensor.location, start * row_bytes, stored.reshape(-1).view(np.uint8).data)
        widen(stored, tensor.dtype, out)
    return out
