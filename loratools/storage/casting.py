"""Values in the dtype that they are stored in, rounded to nearest, ties to even, and rounded once.

torch rounds float64 to bfloat16 or float16 by way of float32, and so twice: 1 + 2^-8 + 2^-30 becomes 1 + 2^-8, a tie,
and then 1, though 1 + 2^-7 is nearer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError, UsageError
from loratools.storage.files import quoted
from loratools.tensors.dtypes import FLOAT_DTYPES, parse_float_dtype, torch_dtype
from loratools.tensors.lazy import LazyTensor, from_torch

if TYPE_CHECKING:
    from torch import Tensor


def stored_dtype(name: str) -> str:
    """The dtype to store weights in, as safetensors spells it.

    Raises:
        UsageError: Weights are not stored in it.
    """
    dtype = parse_float_dtype(name)
    if dtype is None:
        raise UsageError(
            f"weights cannot be stored as {quoted(name)}", hint="choose float32, bfloat16, float16 or float64"
        )
    return dtype


def cast(name: str, tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """The tensor in `dtype`, rounded once; unchanged where `dtype` is None, or the tensor's is not a floating one.

    Args:
        name: What the tensor is called in an error.
        dtype: in safetensors' spelling, one of `FLOAT_DTYPES`.

    Raises:
        UnsupportedError: A finite value is beyond the range of `dtype`.
    """
    if dtype is None or tensor.dtype == dtype or tensor.dtype not in FLOAT_DTYPES:
        return tensor
    return from_torch(narrowed(name, tensor.read(), dtype))


def narrowed(name: str, values: Tensor, dtype: str) -> Tensor:
    """Floating-point values in `dtype`, rounded once.

    Raises:
        UnsupportedError: A finite value is beyond the range of `dtype`.
    """
    stored = rounded(values, dtype)
    if bool((stored.isinf() & values.isfinite()).any()):
        torch_name = str(torch_dtype(dtype)).removeprefix("torch.")
        wider = "float32 or bfloat16" if dtype == "F16" else "float64" if dtype != "F64" else ""
        raise UnsupportedError(
            f"{quoted(name)} has values beyond the range of {torch_name}",
            hint=f"store it with --dtype {wider}" if wider else None,
        )
    return stored


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Floating-point values in `dtype`, on the same device, rounded once; values beyond its range become infinite."""
    import torch

    if values.dtype == torch.float64 and dtype in ("F16", "BF16"):
        values = _rounded_to_odd(values)
    narrower: Tensor = values.to(torch_dtype(dtype))
    return narrower


def _rounded_to_odd(values: Tensor) -> Tensor:
    """float64 to float32 so that rounding the result to a shorter format gives what rounding once would give.

    Boldo and Melquiond, 2008, "Emulation of FMA and correctly rounded sums": the value is cut off, and the last bit
    set if that lost anything. `algebra.rounding` does the same for numpy, which a merge is computed with.
    """
    import torch

    nearest = values.float()
    bits = nearest.view(torch.int32)
    bits -= (nearest.abs() > values.abs()).int()
    bits |= ((nearest != values) & values.isfinite()).int()
    return nearest
