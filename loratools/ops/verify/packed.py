"""Merged weights that are stored on the grid of a quantisation scheme, held against base plus deltas.

A sum that is stored on a grid becomes one of the values that the packed numbers can stand for while scales and zero
points are as the merged model stores them. To nearest, it is explained where it is the value that is nearest to the
sum, up to the error of float32 and to that of the dtype in which the scheme gives its values. Other roundings choose
between the two values next to the sum; which one they choose is found by repeating them (`replay.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.requantise import row_blocks
from loratools.ops.merge.rows import read_rows
from loratools.ops.verify.deltas import Deltas
from loratools.ops.verify.fit import Fit, Sums
from loratools.quantization.common.dequantised import Dequantised
from loratools.quantization.common.protocol import PackedWeight, Part, Writable
from loratools.storage.same import same_bytes
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.rounding import Floats

# Beside the edge between two values a program may decide otherwise by the last bits of its own arithmetic.
_EDGE = 4


def packed_weight(tensor: LazyTensor) -> PackedWeight | None:
    """The packed weight whose values the tensor has; None if it is stored as it is."""
    return tensor.source.weight if isinstance(tensor.source, Dequantised) else None


def grid_name(weight: PackedWeight) -> str:
    """The scheme and its numbers, for people: `bitsandbytes nf4`."""
    scheme, numbers = weight.scheme, weight.parameters.format
    return scheme if numbers.lower() == scheme.lower() else f"{scheme} {numbers}"


def same_grid(first: PackedWeight, second: PackedWeight) -> bool:
    """Whether two weights are stored by the same scheme with the same scales: all but the packed numbers are equal."""
    return is_alike(first, second) and all(map(_same_part, first.parts[1:], second.parts[1:]))


def same_packed(first: PackedWeight, second: PackedWeight) -> bool:
    """Whether two weights are stored by the same scheme in the same bytes."""
    return is_alike(first, second) and all(map(_same_part, first.parts, second.parts))


def is_alike(first: PackedWeight, second: PackedWeight) -> bool:
    """Whether two weights have the same shape, and are stored by the same scheme in parts of the same meaning."""
    kinds = [(w.scheme, w.shape, w.dtype, w.parameters, [p.role for p in w.parts]) for w in (first, second)]
    return kinds[0] == kinds[1]


def _same_part(first: Part, second: Part) -> bool:
    return same_bytes(first.tensor, second.tensor)


@dataclass(frozen=True)
class PackedMeasure:
    """What one pass over a packed weight told.

    Attributes:
        nearest: Whether every value is the one of its grid that is nearest to the sum.
        neighbouring: Whether every value is one of the two of its grid that the sum lies between.
        fit: Sums for the best-fit weights of the deltas.
        max_error_ratio: The largest error, as a share of the distance to the nearest value of the grid and of what the
            arithmetic costs.
    """

    nearest: bool
    neighbouring: bool
    fit: Fit
    max_error_ratio: float


def measure_packed(
    output: Output, weight: PackedWeight, *, sample: float = 1.0, times: Sequence[float] | None = None
) -> PackedMeasure | None:
    """Compare a packed weight of the merged model with base plus deltas; None if its grid is not known.

    Args:
        output: What the weight should be; without updates, the base's values alone.
        weight: The packed weight of the merged model, of the same shape.
        sample: The share of the rows to look at.
        times: What each delta is multiplied with; 1 if None.
    """
    import numpy as np

    parameters = weight.parameters
    if not isinstance(parameters, Writable):
        return None
    deltas = Deltas(output, "F32") if output.updates else None
    sums = Sums(len(deltas.adapters) if deltas is not None else 0)
    nearest = neighbouring = True
    worst = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for first, last in _sampled(output, weight, sample):
            grid = parameters.grid(weight, first, last)
            values = grid.stored().reshape(-1, output.columns)
            start = first * output.rows // weight.shape[0]
            base = read_rows(output, "F32", start, start + len(values))
            parts = deltas.rows(start, start + len(values), base) if deltas is not None else []
            sums.add(base, parts, values)
            exact = base.astype(np.float64)
            for i, part in enumerate(parts):
                exact += part if times is None else times[i] * part.astype(np.float64)
            slack = _slack(deltas, weight, start, base, exact)
            judged = _judge(grid, exact, slack, values)
            nearest, neighbouring = nearest and judged.nearest, neighbouring and judged.neighbouring
            worst = max(worst, judged.error_ratio)
    return PackedMeasure(nearest, neighbouring, sums.fit(sums.count), worst)


def _sampled(output: Output, weight: PackedWeight, sample: float) -> Iterator[tuple[int, int]]:
    blocks = list(row_blocks(output, weight))
    yield from blocks[:: max(1, round(1 / sample))]


def _slack(deltas: Deltas | None, weight: PackedWeight, start: int, base: Floats, exact: Floats) -> Floats:
    """How far a sum may be from the exact one: float32 on both sides, and the dtype of the scheme's values."""
    from loratools.algebra.rounding import gamma, unit_roundoff

    single = unit_roundoff("F32")
    slack: Floats = (unit_roundoff(weight.dtype) + _EDGE * single) * abs(exact)
    if deltas is not None:
        slack += 2 * gamma(deltas.terms + 2, single) * (abs(base) + deltas.magnitude(start, base))
    return slack


@dataclass(frozen=True)
class _Judged:
    nearest: bool
    neighbouring: bool
    error_ratio: float


def _judge(grid: LevelGrid, exact: Floats, slack: Floats, values: Floats) -> _Judged:
    import numpy as np

    from loratools.algebra.rounding import unit_roundoff

    shape = grid.current.shape
    below, above = (exact - slack).reshape(shape), (exact + slack).reshape(shape)
    lower, upper = grid.neighbours(below), grid.neighbours(above)
    stored = values.reshape(shape)
    # An edge lies half the way between two values before they are rounded to the dtype of the scheme.
    edge = unit_roundoff(grid.dtype) * (abs(lower.low) + abs(upper.high)) if grid.dtype != "F32" else 0.0
    least = np.where(below - edge - lower.low <= lower.high - below + edge, lower.low, lower.high)
    most = np.where(above + edge - upper.low >= upper.high - above - edge, upper.high, upper.low)
    nearest = (np.minimum(least, most) <= stored) & (stored <= np.maximum(least, most))
    ends = (lower.low, lower.high, upper.low, upper.high)
    neighbouring = (np.minimum.reduce(ends) <= stored) & (stored <= np.maximum.reduce(ends))
    flat = exact.reshape(shape)
    error = abs(stored - flat)
    allowed = np.minimum(abs(least - flat), abs(most - flat)) + 2 * slack.reshape(shape) + edge
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error > 0, error / allowed, 0.0)
    worst = float(ratio.max(initial=0.0))
    return _Judged(bool(nearest.all()), bool(neighbouring.all()), worst if math.isfinite(worst) else math.inf)
