"""The delta of one update as a dense array, of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from loratools.errors import UsageError
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# Rows at a time that are computed in float64 before they are rounded: of 4,096 columns, 8 MB.
_ROWS = 256


class _Unread:
    """The values of a base that no kind without `needs_base` may ask for."""

    location = None

    def read_rows(self, start: int, stop: int) -> NoReturn:
        raise AssertionError("an update that needs no base has read it")

    def scalar(self) -> NoReturn:
        raise AssertionError("an update that needs no base has read it")


def unread_base(update: Update) -> LazyTensor:
    """A stand-in for the weight that an update belongs to, of its shape and without values."""
    return LazyTensor(tuple(size or 0 for size in update.shape), "F32", _Unread())


def dense_delta(update: Update, base: LazyTensor | None, dtype: str) -> Floats:
    """The delta in the shape of its weight, computed in float64 and rounded once to `dtype`, F32 or F64.

    Where neither the update nor the base tells a shape, the delta is a matrix.

    Args:
        update: Of any kind.
        base: The unmodified weight, of the update's shape; needed where `update.needs_base`.
        dtype: F32 or F64.

    Raises:
        UsageError: The delta depends on the weight, and none is given.
    """
    import numpy as np

    if base is None and update.needs_base:
        raise UsageError(
            f"the change of this {update.kind} depends on the weight that it is added to",
            hint="give it as base; loratools.open_checkpoint(BASE).weights[NAME] is one",
        )
    kind = np.float64 if dtype == "F64" else np.float32
    if (experts := update.as_experts()) is not None:
        parts = [experts.prepare_expert(i, weight=1.0, dtype="F64") for i in range(experts.experts)]
        return np.stack([part.rows(0, part.shape[0]).astype(kind) for part in parts])
    delta = update.prepare(base if base is not None else unread_base(update), weight=1.0, dtype="F64")
    weight = None
    if update.needs_base and base is not None:
        from loratools.storage.arrays import read_array

        weight = read_array(base, "F64").reshape(delta.shape)
    values = np.empty(delta.shape, kind)
    for start in range(0, len(values), _ROWS):
        stop = min(start + _ROWS, len(values))
        values[start:stop] = delta.rows(start, stop, weight[start:stop] if weight is not None else None)
    shape = base.shape if base is not None else update.shape
    return values.reshape([size or 0 for size in shape]) if None not in shape else values
