"""The arithmetic of a merge: rows of the base plus rows of the updates, in float32, rounded once.

Blocks are small enough that the base's rows, the delta, the sum and the result stay in one core's cache; larger ones
ran at half the speed. Their size is fixed, so that the bytes of the result do not depend on the number of workers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from loratools.errors import InputError
from loratools.plan import Output, RowsUnit, WeightedUpdate
from loratools.storage.arrays import read_array
from loratools.storage.files import reading, write_at
from loratools.tensors import LazyTensor
from loratools.updates import Delta
from loratools.updates._factored import FactorDelta, joined

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

_BLOCK_ELEMENTS = 48 << 10
# Of a unit of more than a few blocks, every fourth is measured: a sample of millions, at a quarter of the cost.
_FEW = 16
_MEASURED = 4


@dataclass(frozen=True)
class Gain:
    """What became of an update: sums over weights, that add up over units.

    along     <merged - base, dW>
    energy    <dW, dW>
    still     weights whose stored value is what it was
    """

    along: float = 0.0
    energy: float = 0.0
    still: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Gain) -> Gain:
        return Gain(
            self.along + other.along,
            self.energy + other.energy,
            self.still + other.still,
            self.weights + other.weights,
        )

    def spread_over(self, weights: int) -> Gain:
        """What was measured on some of so many weights, taken for all of them: samples count by what they stand for."""
        if not self.weights or self.weights == weights:
            return self
        share = weights / self.weights
        return Gain(self.along * share, self.energy * share, self.still * share, weights)

    @property
    def gain(self) -> float | None:
        """1 where all of the update survived the rounding, 0 where none did; None where there was no update."""
        return self.along / self.energy if self.energy > 0 else None

    @property
    def unchanged_share(self) -> float | None:
        return self.still / self.weights if self.weights else None


def compute_dtype(output: Output) -> str:
    """float32, save for weights stored in float64."""
    return "F64" if "F64" in (output.dtype, output.values.dtype) else "F32"


def prepared(updates: Sequence[WeightedUpdate], dtype: str) -> list[Delta]:
    """The updates of one weight, ready to give their rows; all that have factors as one."""
    import numpy as np

    # An absurd alpha is told of when the sums are looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        deltas = [u.update.prepare(transposed=u.transposed, weight=u.weight, dtype=dtype) for u in updates]
    factored = [d for d in deltas if isinstance(d, FactorDelta)]
    others = [d for d in deltas if not isinstance(d, FactorDelta)]
    return [*([joined(factored)] if factored else []), *others]


def merge_rows(unit: RowsUnit, fd: int, offset: int) -> Gain:
    """Compute the rows of `unit` and write them to `fd`; `offset` is where the whole tensor begins.

    Raises:
        InputError: a weight does not fit the stored dtype, or is not finite in the base.
    """
    import numpy as np

    output = unit.output
    dtype = compute_dtype(output)
    deltas = prepared(output.updates, dtype)
    step = max(1, _BLOCK_ELEMENTS // max(1, output.columns))
    blocks = range(unit.start, unit.stop, step)
    every = _MEASURED if len(blocks) > _FEW else 1
    gain = Gain()
    # What is not finite is looked for below; numpy's warning would only say that it is there.
    with np.errstate(over="ignore", invalid="ignore"), _rows_of(output.values) as read:
        for i, start in enumerate(blocks):
            stop = min(start + step, unit.stop)
            block = _blocks.sized(output, dtype, stop - start)
            read(start, stop, block)
            if deltas:
                _add(deltas, start, stop, block, output)
                if i % every == 0:
                    gain += _gain(deltas[0] if len(output.updates) == 1 else None, start, stop, block)
            else:
                _cast(block, output)
            write_at(fd, block.stored_bytes, offset + start * output.row_bytes)
    return gain.spread_over((unit.stop - unit.start) * output.columns)


@contextmanager
def _rows_of(values: LazyTensor) -> Iterator[Callable[[int, int, _Block], None]]:
    """A function that fills the `base` of a block with the values of some rows."""
    from loratools.algebra.rounding import widen

    if values.location is None:

        def read(start: int, stop: int, block: _Block) -> None:
            block.base[...] = read_array(values, block.dtype, start, stop).reshape(block.base.shape)

        yield read
        return
    with reading(values.location) as read_bytes:

        def read(start: int, stop: int, block: _Block) -> None:
            read_bytes(start * block.raw_row_bytes, block.raw_bytes)
            widen(block.raw, values.dtype, block.base)

        yield read


def _add(deltas: Sequence[Delta], start: int, stop: int, block: _Block, output: Output) -> None:
    """Fill `block.stored` with base + delta, rounded once."""
    import numpy as np

    from loratools.algebra.rounding import narrow

    delta = deltas[0].rows(start, stop, out=block.delta)
    for other in deltas[1:]:
        delta += other.rows(start, stop)
    exact = np.add(block.base, delta, out=block.exact)
    narrow(exact, output.dtype, block.stored, rounded=block.moved, keep_nan=False)
    # An infinity or nan anywhere makes this sum not finite, so it serves as the check of every weight.
    largest = float(np.vdot(exact, exact))
    if not largest < float("inf") or (output.dtype == "F16" and not np.isfinite(block.moved).all()):
        _refuse(output, block.base, block.base + delta)


def _gain(alone: Delta | None, start: int, stop: int, block: _Block) -> Gain:
    """What became of the update in a block that has just been filled; `alone`: where it is of one adapter only."""
    import numpy as np

    moved = np.subtract(block.moved, block.base, out=block.moved)
    # The cheap way is a difference of large numbers where the deltas of several adapters cancel.
    energy = alone.energy(start, stop) if alone is not None else float(np.vdot(block.delta, block.delta))
    changed = int(np.count_nonzero(np.not_equal(moved, 0, out=block.mask)))
    return Gain(float(np.vdot(moved, block.delta)), energy, moved.size - changed, moved.size)


def _cast(block: _Block, output: Output) -> None:
    """Fill `block.stored` with the base's values, or those that replace them, in another dtype."""
    import numpy as np

    from loratools.algebra.rounding import narrow

    narrow(block.base, output.dtype, block.stored, rounded=block.moved)
    finite = np.isfinite(block.base)
    if not np.isfinite(block.moved[finite]).all():
        _refuse(output, block.base[finite], block.base[finite])


def _refuse(output: Output, base: Floats, exact: Floats) -> NoReturn:
    """Say what is not finite: the base, the result, or only the sum of squares of the update."""
    import numpy as np

    from loratools.algebra.rounding import LARGEST

    if not np.isfinite(base).all():
        raise InputError(f"'{output.name}' of the base holds values that are not finite")
    largest, limit = float(np.where(np.isnan(exact), np.inf, abs(exact)).max()), LARGEST[output.dtype]
    if largest <= limit:
        raise InputError(
            f"'{output.name}' would reach {largest:.4g}, which no trained weight does",
            hint="look at the adapter's alpha and weight",
        )
    raise InputError(
        f"'{output.name}' would reach {largest:.4g}, and {output.dtype} ends at {limit:.4g}",
        hint="look at the adapter's alpha and weight, or store the result with --dtype bfloat16 or float32",
    )


class _Block:
    """Memory for one block, reused from block to block: fresh memory would cost more in page faults than the sums.

    raw       as read                 base     the same in the dtype of the sums
    delta     the updates' rows       exact    base + delta
    moved     what the stored value is worth, then how far it is from the base
    stored    as written
    """

    def __init__(self, read_as: str, stored_as: str, dtype: str, rows: int, columns: int) -> None:
        import numpy as np

        from loratools.algebra.rounding import STORAGE

        self.key = (read_as, stored_as, dtype, rows, columns)
        self.dtype = dtype
        shape = (rows, columns)
        self.raw = np.empty(shape, STORAGE[read_as])
        self.raw_bytes = self.raw.reshape(-1).view(np.uint8).data
        self.raw_row_bytes = columns * self.raw.itemsize
        self.base: Floats = np.empty(shape, STORAGE[dtype])
        self.delta: Floats = np.empty(shape, STORAGE[dtype])
        self.exact: Floats = np.empty(shape, STORAGE[dtype])
        self.moved: Floats = np.empty(shape, STORAGE[dtype])
        self.mask = np.empty(shape, np.bool_)
        self.stored = np.empty(shape, STORAGE[stored_as])
        self.stored_bytes = self.stored.reshape(-1).view(np.uint8).data


class _ThreadBlocks(threading.local):
    """Each worker's own: those of the last shape of block, since blocks of one shape follow each other."""

    last: _Block | None = None

    def sized(self, output: Output, dtype: str, rows: int) -> _Block:
        key = (output.values.dtype, output.dtype, dtype, rows, output.columns)
        if self.last is None or self.last.key != key:
            self.last = _Block(*key)
        return self.last


_blocks = _ThreadBlocks()
