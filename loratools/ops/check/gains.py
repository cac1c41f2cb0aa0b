"""What rounding to the dtype of the base would leave of each update, from some rows of each weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratools.naming.places import Place
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint

# Rows of each weight, in blocks over all of it: a sample of millions of entries tells a share to three digits.
_BLOCKS = 4
_ROWS = 16
_ROUNDED = frozenset({"F16", "BF16", "F32"})


def reason_against_gain(update: Update, places: Sequence[Place], base: Checkpoint) -> str | None:
    """Why the gain of an update is not measured; None if it is."""
    if update.needs_base:
        return "the update depends on all of its weight"
    quantised = base.quantisation.weights if base.quantisation is not None else {}
    if any(place.weight in quantised for place in places):
        return "the weight is quantised"
    if any(place.weight not in base.weights or base.weights[place.weight].dtype not in _ROUNDED for place in places):
        return "the weight is in no float dtype that is rounded to"
    return None


def gain_of(update: Update, places: Sequence[Place], base: Checkpoint) -> float | None:
    """The gain of one update, `<merged - base, dW> / <dW, dW>`, merged by rounding to nearest; None if dW is 0.

    Fused and transposed weights, parts of a weight and stacks of experts are merged as `merge` does it.
    """
    import numpy as np
    import torch

    from loratools.ops.merge.outputs import Output, WeightedUpdate
    from loratools.ops.merge.rows import prepared, read_rows
    from loratools.tensors.dtypes import torch_dtype

    kept_change = total = 0.0
    for place in places:
        weight = base.weights[place.weight]
        output = Output(place.weight, weight.dtype, weight.shape, weight, (WeightedUpdate(0, update, 1.0, place),))
        for delta in prepared(output, "F64", 0, output.rows):
            for start, stop in _row_blocks(delta.start, delta.stop):
                stored = read_rows(output, "F64", start, stop)
                change = np.zeros_like(stored)
                delta.add_to(change, start, stored)
                merged = torch.from_numpy(stored + change).to(torch_dtype(weight.dtype)).double().numpy()
                kept_change += float(np.vdot(merged - stored, change))
                total += float(np.vdot(change, change))
    return kept_change / total if total > 0 else None


def _row_blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Blocks of the rows from the first to before the last: all of few rows, some of many."""
    rows = last - first
    if rows <= _BLOCKS * _ROWS:
        yield first, last
        return
    for block in range(_BLOCKS):
        start = first + block * (rows - _ROWS) // (_BLOCKS - 1)
        yield start, start + _ROWS
