"""Merging into packed weights: rows of the base plus rows of the updates, brought onto the grid of the base's scheme.

Scales and all other parts stay as they are stored; only the packed numbers change, and of these only the ones whose
value does. A weight that gets another type than the base's is quantised with new scales, those of the sums. The packed
numbers of one weight are held in memory while it is merged, since some schemes pack along the outputs and others along
the inputs; sums are formed in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.errors import InputError
from loratools.ops.merge.outputs import Output, Requantised, RowsUnit
from loratools.ops.merge.rounding import chooser
from loratools.ops.merge.rows import Gain, prepared, refuse_not_finite, total_delta
from loratools.ops.merge.verify import exact_rows, largest_share
from loratools.quantization.common.protocol import Fresh, PackedWeight, Writable
from loratools.storage.arrays import ArraySource, read_array, read_raw
from loratools.storage.checksum import Checksum
from loratools.storage.files import read_back, write_at
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

_BLOCK_ELEMENTS = 1 << 17
# How many rows of the first axis are checked after writing: at the start, in the middle and at the end.
_ROWS = 4
# Of sums, neighbours and what they are found with, four bytes each.
_GRID_BYTES = 120


def requantise(unit: RowsUnit, fd: int, offset: int, checksum: Checksum | None = None) -> Gain:
    """Merge a packed weight and write its packed numbers to `fd` at `offset`; `checksum` takes them in.

    Raises:
        InputError: A sum is not finite.
    """
    import numpy as np

    from loratools.algebra.packing import onto_grid

    output, weight, parameters = _writable(unit)
    deltas = prepared(output, "F32", 0, output.rows)
    rounding = output.rounding
    choose = None
    if rounding.mode != "nearest":
        choose = chooser(rounding, output.name, output.matrix, deltas, inputs_along_rows=output.inputs_along_rows)
    fresh = _fresh(unit)
    packed = np.zeros(weight.parts[0].tensor.nbytes, np.uint8) if fresh is not None else _packed_bytes(weight)
    written = _with_packed(weight, packed) if fresh is not None else weight
    gain = Gain()
    for first, last in row_blocks(output, weight):
        rows = (-1, output.columns)
        grid = parameters.grid(weight, first, last) if fresh is None else None
        base = (grid.stored() if grid is not None else read_array(output.values, "F32", first, last)).reshape(rows)
        start = first * output.rows // weight.shape[0]
        delta = np.empty_like(base)
        with np.errstate(over="ignore", invalid="ignore"):
            total_delta(deltas, start, base, delta)
            exact = base + delta
        if not np.isfinite(exact).all():
            refuse_not_finite(output, base, exact)
        if fresh is not None:
            fresh.quantise(weight, exact, first, last, packed)
        if grid is None:
            grid = parameters.grid(written, first, last)
            _refuse_large_scales(output, parameters.format, grid)
        if choose is not None:
            neighbours = grid.neighbours(exact.reshape(grid.current.shape))
            upper = choose(start, exact, neighbours.low.reshape(rows), neighbours.high.reshape(rows))
            codes, values = grid.codes(neighbours, upper.reshape(grid.current.shape))
            parameters.pack(weight, codes, first, last, packed)
        elif fresh is not None:
            values = grid.stored()
        else:
            codes, values = nearest_codes(grid, exact, base, delta)
            parameters.pack(weight, codes, first, last, packed)
        moved = values.reshape(rows) - base
        gain += Gain(
            along=float(np.vdot(moved, delta)),
            energy=float(np.vdot(delta, delta)),
            still=float(np.count_nonzero(moved == 0)),
            weights=moved.size,
            float_error=_square(onto_grid(exact, weight.dtype) - exact),
            stored_error=_square(moved - delta),
        )
    write_at(fd, packed.data, offset)
    if checksum is not None:
        checksum.add(packed.data)
    return replace(gain, undirected=choose.undirected) if choose is not None else gain


def nearest_codes(grid: LevelGrid, exact: Floats, base: Floats, delta: Floats) -> tuple[Integers, Floats]:
    """The codes of the levels nearest to sums, and their values; of two that are equally near, the one stored already.

    Only those are looked for that the update may have moved beyond the middle between two levels: few, as a rule.

    Args:
        grid: The levels, and the codes that are stored now.
        exact: The sums, (rows, columns).
        base: What is stored now, in the same shape.
        delta: What was added to it.
    """
    import numpy as np

    shape = grid.current.shape
    sums, before = exact.reshape(shape), base.reshape(shape)
    places = grid.may_leave(before, delta.reshape(shape))
    movable = grid.at(places)
    neighbours = movable.neighbours(sums[places])
    below, above = sums[places] - neighbours.low, neighbours.high - sums[places]
    upper = (above < below) | ((above == below) & (neighbours.high == before[places]))
    codes, values = np.array(grid.current), np.array(before)
    codes[places], values[places] = movable.codes(neighbours, upper)
    return codes, values


def requantised_error_ratio(unit: RowsUnit, fd: int, offset: int) -> float:
    """The largest error in a sample of rows that have been written, as a share of what is allowed.

    The packed numbers are read back and dequantised by the scheme. Allowed is the distance to the nearer neighbour of
    `base + update`, computed anew in float64, or to the farther one where rounding chooses between them, or a new type
    chose codes before its scales were rounded; and what summing in float32 costs.
    """
    import numpy as np

    from loratools.algebra.rounding import gamma, unit_roundoff

    output, weight, parameters = _writable(unit)
    packed = np.empty(weight.parts[0].tensor.nbytes, np.uint8)
    read_back(fd, packed.data, offset)
    written = _with_packed(weight, packed)
    deltas = prepared(output, "F64", 0, output.rows)
    terms = sum(d.terms for d in deltas)
    worst = 0.0
    fresh = _fresh(unit)
    for first, last in _sample(weight):
        grid = parameters.grid(written if fresh is not None else weight, first, last)
        rows = (-1, output.columns)
        start = first * output.rows // weight.shape[0]
        base = grid.stored() if fresh is None else read_array(output.values, "F32", first, last)
        base = base.astype(np.float64).reshape(rows)
        stored = written.parameters.dequantise(written, first, last).astype(np.float64).reshape(rows)
        exact, magnitude = exact_rows(deltas, start, base)
        slack = gamma(terms + 2, unit_roundoff("F32")) * (abs(base) + magnitude)
        low = grid.neighbours((exact - slack).reshape(grid.current.shape)).low.reshape(rows)
        high = grid.neighbours((exact + slack).reshape(grid.current.shape)).high.reshape(rows)
        distances = abs(low - exact), abs(high - exact)
        nearest = output.rounding.mode == "nearest" and fresh is None
        allowed = (np.minimum if nearest else np.maximum)(*distances) + 2 * slack
        worst = max(worst, largest_share(abs(stored - exact), allowed))
    return worst


def requantising_memory(requantised: Requantised) -> int:
    """Bytes that merging one packed weight takes."""
    step = max((last - first for first, last in row_blocks(requantised.output, requantised.weight)), default=0)
    inner = math.prod(requantised.weight.shape[1:])
    return requantised.weight.parts[0].tensor.nbytes + _GRID_BYTES * step * inner


def _writable(unit: RowsUnit) -> tuple[Output, PackedWeight, Writable]:
    requantised = unit.output.requantised
    assert requantised is not None, "such units are planned for packed weights only"
    parameters = requantised.weight.parameters
    assert isinstance(parameters, Writable), "others are refused before anything is planned"
    return requantised.output, requantised.weight, parameters


def _refuse_large_scales(output: Output, kind: str, grid: LevelGrid) -> None:
    import numpy as np

    if not np.isfinite(grid.stored()).all():
        raise InputError(
            f"'{output.name}' would hold values whose scale is beyond float16, in which {kind} stores it",
            hint="look at the adapter's alpha and weight, or write the changed weights with --dequantize",
        )


def _fresh(unit: RowsUnit) -> Fresh | None:
    """What quantises the weight with new scales; None if it keeps those that it has."""
    requantised = unit.output.requantised
    if requantised is None or not requantised.retyped:
        return None
    parameters = requantised.weight.parameters
    assert isinstance(parameters, Fresh), "others are refused before anything is planned"
    return parameters


def row_blocks(output: Output, weight: PackedWeight) -> Iterator[tuple[int, int]]:
    """Rows of the first axis in runs that are merged together."""
    rows, inner = weight.shape[0], max(1, math.prod(weight.shape[1:]))
    wanted = output.rounding.block_rows(inner) if output.rounding.feeds_back else _BLOCK_ELEMENTS // inner
    # An even number of rows has a whole number of bytes, whatever its columns.
    unit = math.lcm(2, weight.row_block)
    if output.rows != rows:
        unit, wanted = 1, 1  # experts, one by one
    step = max(unit, wanted // unit * unit)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _sample(weight: PackedWeight) -> list[tuple[int, int]]:
    rows = weight.shape[0]
    unit = weight.row_block
    step = unit if unit > 1 or len(weight.shape) > 2 else _ROWS
    starts = {0, rows // 2 // step * step, max(0, rows - 1) // step * step}
    return [(start, min(start + step, rows)) for start in sorted(starts) if start < rows]


def _packed_bytes(weight: PackedWeight) -> Bytes:
    import numpy as np

    return np.ascontiguousarray(read_raw(weight.parts[0].tensor)).reshape(-1).view(np.uint8)


def _with_packed(weight: PackedWeight, packed: Bytes) -> PackedWeight:
    """The weight with other packed numbers."""
    part = weight.parts[0]
    tensor = LazyTensor(part.tensor.shape, part.tensor.dtype, ArraySource(packed))
    return replace(weight, parts=(part._replace(tensor=tensor), *weight.parts[1:]))


def _square(values: Floats) -> float:
    import numpy as np

    return float(np.vdot(values, values))
