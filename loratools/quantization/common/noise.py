"""The quantisation error of a weight, estimated from the grid that its values lie on.

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

# How many values of a weight are examined, and in how many pieces: similar rows may be next to each other.
_SAMPLE, _PIECES = 1 << 18, 4


def quantisation_error(tensor: LazyTensor) -> float:
    """The estimated standard deviation of the quantisation error in each value of a tensor.

    Args:
        tensor: A weight of a checkpoint, or a view of such weights, as for experts that are stored one by one.

    Returns:
        The root mean squared error; 0.0 if the values were never quantised. It is computed from the levels of the grid
        if the scheme can be written, otherwise from the smallest distance of the values that share a scale.
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
    """The variance in the cells of a uniform grid, whose step is the smallest distance of values that share a scale."""
    import numpy as np

    columns = values.shape[1]
    size = group if group and columns % group == 0 else columns
    groups = np.sort(values.reshape(-1, size), axis=1)
    distances = np.diff(groups, axis=1)
    steps = np.where(distances > 0, distances, np.inf).min(axis=1, initial=np.inf)
    squares = np.square(np.where(np.isfinite(steps), steps, 0), dtype=np.float64)
    return float(squares.mean()) / 12
