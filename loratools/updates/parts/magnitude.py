"""DoRA's magnitude on top of a delta: `W' = m (W + dW) / |W + dW|`, whatever kind dW is of.

The norm is that of the unmodified base plus this adapter's own delta, in float64, as in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.deltas import DenseDelta, FactorDelta, ScaledDelta, dense
from loratools.updates.parts.faults import faulty

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats
    from loratools.updates.parts.protocol import Delta

# Elements of the base that are looked at in one go.
_BLOCK_ELEMENTS = 1 << 20


def with_magnitude(
    delta: Delta,
    magnitude: LazyTensor,
    base: LazyTensor,
    *,
    by: Literal["row", "column"],
    repeat: int = 1,
    weight: float,
    dtype: str,
) -> Delta:
    """Return a delta with the magnitude of DoRA.

    `weight * (m (W + dW) / |W + dW| - W)` for an unweighted `delta` in float64, of a weight as a matrix.

    by       whether there is one magnitude for each row of the matrix, or for each column.
    repeat   neighbouring columns that share one magnitude and one norm: the elements of a kernel.

    Where W + dW is zero along a whole row it has no direction, and stays zero.
    """
    import numpy as np

    rows, columns = delta.shape
    squares: Floats = np.zeros(rows if by == "row" else columns // repeat)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = _base_rows(base, start, stop)
        values += delta.rows(start, stop, values)
        if by == "row":
            squares[start:stop] = np.einsum("ij,ij->i", values, values)
        else:
            squares += np.einsum("ij,ij->j", values, values).reshape(-1, repeat).sum(axis=1)
    m = read_array(magnitude, "F64").reshape(-1)
    ratio: Floats = np.divide(m, np.sqrt(squares), out=np.zeros_like(m), where=squares > 0)
    ratio = ratio if by == "row" or repeat == 1 else np.repeat(ratio, repeat)
    return _rescaled(delta, ratio, base, by, weight, dtype)


def _rescaled(delta: Delta, ratio: Floats, base: LazyTensor, by: str, weight: float, dtype: str) -> Delta:
    import numpy as np

    if isinstance(delta, FactorDelta):
        kind = np.float64 if dtype == "F64" else np.float32
        b, a = (delta.b * ratio[:, None], delta.a) if by == "row" else (delta.b, delta.a * ratio)
        scale = ((ratio - 1) * weight).astype(kind)
        added = FactorDelta((b * weight).astype(kind), a.astype(kind))
        return ScaledDelta(scale if by == "row" else None, scale if by == "column" else None, added, delta.shape)
    base_values = _base_rows(base, 0, delta.shape[0])
    merged = base_values + delta.rows(0, delta.shape[0], base_values)
    merged *= ratio[:, None] if by == "row" else ratio
    merged -= base_values
    rescaled: DenseDelta = dense(merged, weight, dtype)
    return rescaled


def _base_rows(base: LazyTensor, start: int, stop: int) -> Floats:
    return read_array(base, "F64", start, stop).reshape(stop - start, -1)


def magnitude_axis(magnitude: LazyTensor, out: int, module: str) -> Literal["out", "in"]:
    """Whose norm LyCORIS stores as `dora_scale`, by its shape: (out, 1, ...), or (1, in, 1, ...) before 3.2.

    Raises:
        FormatError: The shape is neither.
    """
    sizes = magnitude.shape
    if len(sizes) >= 2 and sizes[0] == out and magnitude.elements == out:
        return "out"
    if len(sizes) >= 2 and sizes[1] == magnitude.elements:
        return "in"
    fault = f"has dora_scale {list(sizes)}: one number for each of {out} outputs, or for each input, is needed"
    raise faulty(module, fault)
