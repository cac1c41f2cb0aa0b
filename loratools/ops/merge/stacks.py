"""Many small weights of one shape, merged as a stack, or copied: a model of experts has tens of thousands of them.

What numpy and Python do for each call costs a hundred times what the arithmetic of one such weight does. A stack has
the same products, sums and roundings for each of its weights as `merge_rows` has for one alone, so the same bytes; the
self-check reads everything anew, as it does for one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import CopyUnit, Output, WorkUnit
from loratools.ops.merge.rows import Gain, compute_dtype
from loratools.storage.checksum import Checksum
from loratools.storage.files import read_back, read_into, write_at
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats, Stored

# The largest weight that is stacked, in elements: of this size the arithmetic outweighs the calls.
_LARGEST = 8192
# Elements of a stack: a few float64 arrays of this size are in memory at once.
_ELEMENTS = 1 << 17
# Fewer units than these are not worth a stack.
_FEWEST = 16
# Tensors are read in one piece if the distance between the first and the last is at most this multiple of their size.
_SPREAD = 8


@dataclass(frozen=True)
class Measured:
    """What was measured on one weight of a stack: what became of its update, and its largest error."""

    gain: Gain
    ratio: float


def stacked_units(units: Sequence[WorkUnit]) -> list[tuple[WorkUnit, ...]]:
    """All units: those that can be merged as a stack together, small copies of one file together, others alone."""
    stacks: list[tuple[WorkUnit, ...]] = []
    open_stacks: dict[Hashable, list[WorkUnit]] = {}
    sizes: dict[Hashable, int] = {}
    for unit in units:
        kind = _kind(unit)
        if kind is None:
            stacks.append((unit,))
            continue
        open_stacks.setdefault(kind, []).append(unit)
        elements = unit.source.nbytes if isinstance(unit, CopyUnit) else unit.output.rows * unit.output.columns
        sizes[kind] = sizes.get(kind, 0) + elements
        if sizes[kind] >= _ELEMENTS:
            stacks.append(tuple(open_stacks.pop(kind)))
            del sizes[kind]
    for stack in open_stacks.values():
        stacks += [tuple(stack)] if len(stack) >= _FEWEST else [(unit,) for unit in stack]
    return stacks


def _kind(unit: WorkUnit) -> Hashable | None:
    """What units of one stack have in common; None for a unit that is merged alone."""
    if isinstance(unit, CopyUnit):
        return (unit.file, unit.source.file) if unit.source.nbytes <= _LARGEST else None
    output = unit.output
    if not output.updates or len(output.shape) != 2:
        return None
    rows, columns = output.shape
    if not 0 < rows * columns <= _LARGEST or (unit.start, unit.stop) != (0, rows):
        return None
    values = output.values
    if output.patches or output.requantised is not None or output.rounding.mode != "nearest":
        return None
    if values.shape != output.shape or values.dtype not in FLOAT_DTYPES or values.location is None:
        return None
    factors: list[Hashable] = []
    for weighted in output.updates:
        lora = weighted.update.as_lora()
        if lora is None or lora.mid is not None or lora.magnitude is not None or lora.embedding:
            return None
        a, b = lora.a, lora.b
        if weighted.place.transposed or not weighted.place.is_whole:
            return None
        if (b.shape[0], a.shape[1:]) != (rows, (columns,)) or len(b.shape) != 2 or 0 in a.shape:
            return None
        for factor in (a, b):
            if factor.dtype not in FLOAT_DTYPES or factor.location is None:
                return None
            factors.append((factor.shape, factor.dtype, factor.location.file))
    return unit.file, output.shape, values.dtype, values.location.file, output.dtype, tuple(factors)


def merge_stack(
    outputs: Sequence[Output], offsets: Sequence[int], fd: int, *, verify: bool, checksum: Checksum | None = None
) -> list[Measured] | None:
    """Merge the weights of a stack and write each at its offset in `fd`; `checksum` takes in what is written.

    Returns:
        What was measured on each; None, with nothing written, where a sum does not fit the stored dtype or is not
        finite: merged alone, each weight says so by its name.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, narrow

    first = outputs[0]
    dtype = compute_dtype(first)
    with np.errstate(over="ignore", invalid="ignore"):
        base = _stack([output.values for output in outputs], dtype)
        b, a = _factors(outputs, dtype)
        delta = np.matmul(b, a)
        exact = base + delta
        stored = np.empty(exact.shape, STORAGE[first.dtype])
        merged = np.empty_like(exact)
        narrow(exact, first.dtype, stored, rounded=merged)
        if not np.isfinite(merged).all():
            return None
        moved = merged - base
        along = np.einsum("nij,nij->n", moved, delta, dtype=np.float64)
        energy = np.einsum("nij,nij->n", delta, delta, dtype=np.float64)
        if not np.isfinite(energy).all():
            return None
        changed = np.count_nonzero(moved, axis=(1, 2))
    size = first.rows * first.columns
    for values, offset in zip(stored, offsets, strict=True):
        data = values.reshape(-1).view(np.uint8).data
        write_at(fd, data, offset)
        if checksum is not None:
            checksum.add(data)
    ratios = _error_ratios(outputs, offsets, fd) if verify else [0.0] * len(outputs)
    return [
        Measured(Gain(float(along[i]), float(energy[i]), size - int(changed[i]), size), ratio)
        for i, ratio in enumerate(ratios)
    ]


def _error_ratios(outputs: Sequence[Output], offsets: Sequence[int], fd: int) -> list[float]:
    """The largest error of each weight, all read anew, as a share of what one rounding allows (see `error_ratio`)."""
    import numpy as np

    from loratools.algebra.rounding import STORAGE, merge_error_bound, widen
    from loratools.ops.merge.verify import share_of_allowed

    first = outputs[0]
    base = _stack([output.values for output in outputs], "F64")
    b, a = _factors(outputs, "F64")
    stored = np.empty(base.shape, STORAGE[first.dtype])
    _gather(stored, offsets, lambda start, buffer: read_back(fd, buffer, start))
    merged = np.empty_like(base)
    widen(stored, first.dtype, merged)
    bound = merge_error_bound(abs(base), abs(b) @ abs(a), merged, first.dtype, a.shape[1])
    shares: list[float] = share_of_allowed(abs(merged - (base + b @ a)), bound).max(axis=(1, 2)).tolist()
    return shares


def _factors(outputs: Sequence[Output], dtype: str) -> tuple[Floats, Floats]:
    """`b: (n, rows, rank)` with scale and weight, and `a: (n, rank, columns)`: those of all adapters as one pair."""
    import numpy as np

    kind = np.float64 if dtype == "F64" else np.float32
    left, right = [], []
    for updates in zip(*(output.updates for output in outputs), strict=True):
        loras = [(lora, weighted.weight) for weighted in updates if (lora := weighted.update.as_lora()) is not None]
        # The constant meets one factor in float64, so that it is rounded once and not once more for the constant.
        constants = np.array([lora.scale * weight for lora, weight in loras])[:, None, None]
        left.append((_stack([lora.b for lora, _ in loras], "F64") * constants).astype(kind))
        right.append(_stack([lora.a for lora, _ in loras], dtype))
    if len(left) == 1:
        return left[0], right[0]
    return np.concatenate(left, axis=2), np.concatenate(right, axis=1)


def _stack(tensors: Sequence[LazyTensor], dtype: str) -> Floats:
    """Tensors of one shape, dtype and file as (n, *shape) in `dtype`, F32 or F64."""
    import numpy as np

    from loratools.algebra.rounding import STORAGE, widen

    stored: Stored = np.empty((len(tensors), *tensors[0].shape), STORAGE[tensors[0].dtype])
    places = [place for tensor in tensors if (place := tensor.location) is not None]
    file = places[0].file
    _gather(
        stored,
        [place.offset for place in places],
        lambda start, buffer: read_into(ByteRange(file, start, len(buffer)), 0, buffer),
    )
    values: Floats = np.empty(stored.shape, np.float64 if dtype == "F64" else np.float32)
    widen(stored, tensors[0].dtype, values)
    return values


def _gather(stored: Stored, offsets: Sequence[int], read: Callable[[int, memoryview], None]) -> None:
    """Fill the arrays of a stack with what lies at these offsets of a file: in one piece, unless it lies far apart."""
    import numpy as np

    flat = stored.reshape(len(offsets), -1).view(np.uint8)
    nbytes = flat.shape[1]
    start, stop = min(offsets), max(offsets) + nbytes
    if stop - start > _SPREAD * flat.size:
        for target, offset in zip(flat, offsets, strict=True):
            read(offset, target.data)
        return
    piece = np.empty(stop - start, np.uint8)
    read(start, piece.data)
    for target, offset in zip(flat, offsets, strict=True):
        target[...] = piece[offset - start : offset - start + nbytes]
