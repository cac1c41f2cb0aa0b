"""Refuses values that are not finite: NaN or infinite. One form of error for all verbs, which names file and tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools.errors import InputError
from loratools.formats.common.source import counted
from loratools.storage.arrays import read_array
from loratools.storage.files import quoted
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

# What helps where an adapter is to blame, where a checkpoint is, and where sums are that were computed.
DIVERGED = "the training run diverged; take an earlier checkpoint, or leave these out with --exclude"
DAMAGED = "the training run diverged, or the file is damaged; compare its checksum with the original's"
OUT_OF_RANGE = "look at the weights that adapters are given, and at the alpha of each"

# Elements that are read together.
_BLOCK_ELEMENTS = 1 << 18


def not_finite(whose: str, tensors: Sequence[str], hint: str) -> InputError:
    """The error of tensors with values that are not finite.

    Args:
        whose: What they belong to: a file or an adapter, in quotes, or a description.
        tensors: Their names, one a line.
        hint: What a person can do.
    """
    has = "has" if len(tensors) == 1 else "have"
    return InputError(
        f"{counted(len(tensors), 'tensor')} of {whose} {has} values that are not finite (NaN or infinite)",
        details=tensors,
        hint=hint,
    )


def refuse_not_finite(tensors: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    """Read all tensors, by the adapter that they are of, and refuse those with values that are not finite.

    Raises:
        InputError: Some are not finite; every such tensor is named.
    """
    bad = {
        name: lines
        for name, by_name in tensors.items()
        if (lines := [tensor_name for tensor_name, tensor in by_name.items() if not is_finite(tensor)])
    }
    if len(bad) == 1:
        ((name, lines),) = bad.items()
        raise not_finite(quoted(name), lines, DIVERGED)
    if bad:
        every = [f"{quoted(name)}   {line}" for name, lines in bad.items() for line in lines]
        raise not_finite(f"{len(bad)} adapters", every, DIVERGED)


def require_finite(whose: str, name: str, hint: str, *values: Tensor) -> None:
    """Check values that have been read or computed already.

    Raises:
        InputError: One of them is NaN or infinite.
    """
    if not all(are_finite(each) for each in values):
        raise not_finite(whose, [name], hint)


def require_finite_delta(name: str, delta: Tensor, *sides: LazyTensor) -> None:
    """Check the difference of the tensors `sides`, or the values of one, naming the file of the one to blame.

    Raises:
        InputError: A value is NaN or infinite.
    """
    if are_finite(delta):
        return
    side = next((side for side in sides if not is_finite(side)), None)
    location = side.location if side is not None else None
    raise not_finite(quoted(location.file.path) if location is not None else "the models", [name], DAMAGED)


def is_finite(tensor: LazyTensor) -> bool:
    """Whether all values are finite, read in blocks of rows: a saved embedding may be larger than all else in memory.

    Dtypes that are not computed with count as finite.
    """
    import numpy as np

    if tensor.dtype not in FLOAT_DTYPES:
        return True
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _BLOCK_ELEMENTS // max(1, tensor.elements // max(1, rows)))
    # The widest dtype: what float64 holds may be infinite in float32.
    blocks = (read_array(tensor, "F64", i, min(i + step, rows)) for i in range(0, rows, step))
    return all(bool(np.isfinite(block).all()) for block in blocks)


def are_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    # One value that is not finite makes the sum so; finite values hardly ever do, and are then looked at one by one.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())
