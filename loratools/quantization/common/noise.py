"""What quantisation did to the values of a weight, estimated from the grid that they lie on now.

A number that was rounded to nearest lies anywhere in the cell of its level, and the cells are known: they reach half
the way to the neighbouring levels (Bennett, "Spectra of quantized signals", 1948).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.quantization.common.dequantised import Dequantised
from loratools.quantization.common.protocol import PackedWeight, Writable
from loratools.tensors.lazy import LazyTensor, viewed

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# Values that are looked at in one weight, and the pieces that these lie in: rows of a kind may lie together.
_SAMPLE, _PIECES = 1 << 18, 4


def quantisation_error(tensor: LazyTensor) -> float:
    """The standard deviation of the error that quantisation made in each value of a tensor, estimated.

    Args:
        tensor: A weight of a checkpoint, or a view of such weights, as of experts that are stored one by one.

    Returns:
        The root of the mean squared error; 0.0 where the values were never quantised. By the levels of the grid where
        the form can be written again, otherwise by the smallest distance of the values that share a scale.
    """
    leaves = viewed(tensor)
    total = math.fsum(_variance(t.source.weight) * t.elements for t in leaves if isinstance(t.source, Dequantised))
    return math.sqrt(total / max(1, sum(t.elements for t in leaves)))


def _variance(weight: PackedWeight) -> float:
    import numpy as np

    rows, per_row = weight.shape[0], max(1, math.prod(weight.shape[1:]))
    step = weight.row_block
    length = -(-min(rows, max(1, _SAMPLE // per_row)) // (_PIECES * step)) * step
    starts = sorted({i * max(0, rows - length) // (_PIECES - 1) // step * step for i in range(_PIECES)})
    pieces = [(start, min(start + length, rows)) for start in starts]
    return float(np.mean([_variance_of_rows(weight, *piece) for piece in pieces])) if rows else 0.0


def _variance_of_rows(weight: PackedWeight, start: int, stop: int) -> float:
    if isinstance(weight.parameters, Writable):
        return float(weight.parameters.grid(weight, start, stop).cell_variance().mean())
    values = weight.parameters.dequantise(weight, start, stop)
    return _by_distances(values.reshape(stop - start, -1), weight.parameters.group)


def _by_distances(values: Floats, group: int | None) -> float:
    """The variance in the cells of an even grid, whose step is the smallest distance of values that share a scale."""
    import numpy as np

    columns = values.shape[1]
    size = group if group and columns % group == 0 else columns
    groups = np.sort(values.reshape(-1, size), axis=1)
    distances = np.diff(groups, axis=1)
    steps = np.where(distances > 0, distances, np.inf).min(axis=1, initial=np.inf)
    squares = np.square(np.where(np.isfinite(steps), steps, 0), dtype=np.float64)
    return float(squares.mean()) / 12
