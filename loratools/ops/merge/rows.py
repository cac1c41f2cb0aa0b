"""The arithmetic of a merge: rows of the base plus rows of the updates, in float32, rounded once.

Blocks are small enough that the base's rows, the delta, the sum and the result stay in one core's cache; larger ones
ran at half the speed. Their size is fixed, so that the bytes of the result do not depend on the number of workers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from loratools.errors import InputError
from loratools.naming.places import Place
from loratools.ops.common.finite import DAMAGED, not_finite
from loratools.ops.merge.outputs import Output, RowsReplaced, RowsUnit, WeightedUpdate
from loratools.ops.merge.rounding import Chooser, chooser
from loratools.ops.merge.views import as_updated
from loratools.storage.arrays import read_array
from loratools.storage.checksum import Checksum
from loratools.storage.files import reading, write_at
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import Span, reshaped
from loratools.updates.parts.deltas import FactorDelta, joined
from loratools.updates.parts.protocol import Delta

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
    undirected   of errors that should have been fed back: weights that were rounded to nearest, as nothing is known of
                 the inputs that their updates read
    float_error, stored_error   of sums that are quantised again: squares of what storing them in the float dtype of the
                 weight would cost, and of what storing them on its grid does
    """

    along: float = 0.0
    energy: float = 0.0
    still: float = 0.0
    weights: float = 0.0
    undirected: int = 0
    float_error: float = 0.0
    stored_error: float = 0.0

    def __add__(self, other: Gain) -> Gain:
        return Gain(
            self.along + other.along,
            self.energy + other.energy,
            self.still + other.still,
            self.weights + other.weights,
            self.undirected + other.undirected,
            self.float_error + other.float_error,
            self.stored_error + other.stored_error,
        )

    def spread_over(self, weights: int) -> Gain:
        """Measurements on samples of the weights, scaled up to all of them."""
        if not self.weights or self.weights == weights:
            return self
        share = weights / self.weights
        return replace(
            self, along=self.along * share, energy=self.energy * share, still=self.still * share, weights=weights
        )

    @property
    def gain(self) -> float | None:
        """The share of the update that survived the rounding.

        1 where all of the update survived the rounding, 0 where none did; None if there was no update.
        """
        return self.along / self.energy if self.energy > 0 else None

    @property
    def unchanged_share(self) -> float | None:
        return self.still / self.weights if self.weights else None


def compute_dtype(output: Output) -> str:
    """The dtype that sums are computed in: float32, or float64 for weights stored in float64."""
    return "F64" if "F64" in (output.dtype, output.values.dtype) else "F32"


@dataclass(frozen=True, eq=False)
class AddedDelta:
    """A delta, transposed and cut as it is stored, and its rows and columns in the matrix of an output."""

    delta: Delta
    start: int
    stop: int
    columns: slice
    everywhere: bool

    @property
    def terms(self) -> int:
        return self.delta.terms

    def within(self, start: int, stop: int) -> tuple[int, int] | None:
        """The rows among start:stop of the output that it is a part of."""
        first, last = max(start, self.start), min(stop, self.stop)
        return (first, last) if first < last else None

    def add_to(self, total: Floats, start: int, base: Floats) -> None:
        """Add its share to rows of the output that begin at `start`."""
        if (rows := self.within(start, start + len(total))) is not None:
            target = slice(rows[0] - start, rows[1] - start), self.columns
            total[target] += self.delta.rows(rows[0] - self.start, rows[1] - self.start, base[target])

    def add_magnitude_to(self, total: Floats, start: int, base: Floats) -> None:
        if (rows := self.within(start, start + len(total))) is not None:
            target = slice(rows[0] - start, rows[1] - start), self.columns
            total[target] += self.delta.magnitude(rows[0] - self.start, rows[1] - self.start, base[target])


def prepared(output: Output, dtype: str, start: int, stop: int) -> list[AddedDelta]:
    """The updates of rows start:stop of one output, ready to give their rows; all factors that go everywhere as one."""
    import numpy as np

    added: list[AddedDelta] = []
    # An absurd alpha is reported when the sums are checked.
    with np.errstate(over="ignore", invalid="ignore"):
        for weighted in output.updates:
            first, last, columns, everywhere = _bounds(output, weighted.place)
            if first < stop and start < last:
                added.append(AddedDelta(_delta(output, weighted, dtype), first, last, columns, everywhere))
    factored = [p.delta for p in added if p.everywhere and isinstance(p.delta, FactorDelta)]
    if not factored:
        return added
    joined_factors = AddedDelta(joined(factored), 0, output.rows, slice(None), True)
    return [joined_factors, *(p for p in added if not (p.everywhere and isinstance(p.delta, FactorDelta)))]


def _bounds(output: Output, place: Place) -> tuple[int, int, slice, bool]:
    """First and last row of the output's matrix at which a place lies, its columns, and whether that is everything."""
    rows, columns = output.matrix
    each = output.shape[1] if place.at.expert is not None else rows
    first = each * (place.at.expert or 0)
    span = place.at.rows or Span(0, each)
    assert span.step == 1, "rows that lie apart are columns of the transpose"
    chosen = place.at.columns.slice if place.at.columns is not None else slice(None)
    everywhere = len(span) == rows and (place.at.columns is None or len(place.at.columns) == columns)
    return first + span.start, first + span.stop, chosen, everywhere


def _delta(output: Output, weighted: WeightedUpdate, dtype: str) -> Delta:
    place, update = weighted.place, weighted.update
    delta: Delta
    if (experts := update.as_experts()) is not None:
        assert place.of.expert is not None
        delta = experts.prepare_expert(place.of.expert, weight=weighted.weight, dtype=dtype)
    else:
        delta = update.prepare(as_updated(output.values, place), weight=weighted.weight, dtype=dtype)
    if place.of.rows is not None or place.of.columns is not None:
        # A kind that looks at its whole weight has been given a part of it: matching leaves those out.
        delta = delta.part(_slice(place.of.rows), _slice(place.of.columns))
    if place.order is not None:
        delta = delta.part(place.order(delta.shape[0]), slice(None))
    return delta.transposed() if place.transposed else delta


def _slice(span: Span | None) -> slice:
    return span.slice if span is not None else slice(None)


def merge_rows(unit: RowsUnit, fd: int, offset: int, checksum: Checksum | None = None) -> Gain:
    """Compute the rows of `unit` and write them to `fd`; `offset` is where the whole tensor begins.

    `checksum` takes in what is written.

    Raises:
        InputError: A weight does not fit the stored dtype, or is not finite in the base.
    """

    def write(start: int, data: memoryview) -> None:
        write_at(fd, data, offset + start)
        if checksum is not None:
            checksum.add(data)

    return merge_blocks(unit, write)


def merge_blocks(unit: RowsUnit, write: Callable[[int, memoryview], None]) -> Gain:
    """Compute the rows of `unit` block by block; `write` takes where in its tensor a block begins, and its bytes.

    The bytes are only good until `write` returns.

    Raises:
        InputError: A weight does not fit the stored dtype, or is not finite in the base.
    """
    import numpy as np

    output = unit.output
    dtype = compute_dtype(output)
    deltas = prepared(output, dtype, unit.start, unit.stop)
    rounding = output.rounding
    choose = None
    step = max(1, _BLOCK_ELEMENTS // max(1, output.columns))
    if deltas and rounding.mode != "nearest":
        choose = chooser(rounding, output.name, output.matrix, deltas, inputs_along_rows=output.inputs_along_rows)
        step = rounding.block_rows(output.columns) if rounding.feeds_back else step
    blocks = range(unit.start, unit.stop, step)
    every = _MEASURED if len(blocks) > _FEW else 1
    gain = Gain()
    # What is not finite is looked for below; numpy's warning would only say that it is there.
    with np.errstate(over="ignore", invalid="ignore"), _rows_of(reshaped(output.values, output.matrix)) as read:
        for i, start in enumerate(blocks):
            stop = min(start + step, unit.stop)
            block = _blocks.sized(output, dtype, stop - start)
            read(start, stop, block)
            _patch(output.patches, start, block.base)
            if deltas:
                _add(deltas, start, block, output, choose)
                if i % every == 0:
                    only_delta = deltas[0].delta if len(output.updates) == 1 and deltas[0].everywhere else None
                    gain += _gain(only_delta, start, stop, block)
            else:
                _cast(block, output)
            write(start * output.row_bytes, block.stored_bytes)
    gain = gain.spread_over((unit.stop - unit.start) * output.columns)
    return replace(gain, undirected=choose.undirected) if choose is not None else gain


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


def read_rows(output: Output, dtype: str, start: int, stop: int) -> Floats:
    """Rows start:stop of what updates are added to, in F32 or F64."""
    base = read_array(reshaped(output.values, output.matrix), dtype, start, stop)
    _patch(output.patches, start, base)
    return base


def _patch(patches: Sequence[RowsReplaced], start: int, base: Floats) -> None:
    """Put the rows that are replaced among those of `base`, which begin at `start`."""
    for patch in patches:
        for i, row in enumerate(patch.rows):
            if start <= row < start + len(base):
                base[row - start] = read_array(patch.values, "F64", i, i + 1).reshape(-1)


def _add(deltas: Sequence[AddedDelta], start: int, block: _Block, output: Output, choose: Chooser | None) -> None:
    """Fill `block.stored` with base + delta, rounded once; to nearest where nothing chooses."""
    import numpy as np

    from loratools.algebra.rounding import narrow

    delta = block.delta
    total_delta(deltas, start, block.base, delta)
    exact = np.add(block.base, delta, out=block.exact)
    # An infinity or nan anywhere makes this sum not finite, so it serves as the check of every weight.
    largest = float(np.vdot(exact, exact))
    if choose is not None and largest < float("inf"):
        _choose(choose, start, block, output)
    else:
        narrow(exact, output.dtype, block.stored, rounded=block.moved, keep_nan=False)
    if not largest < float("inf") or (output.dtype == "F16" and not np.isfinite(block.moved).all()):
        refuse_not_finite(output, block.base, block.base + delta)


def total_delta(deltas: Sequence[AddedDelta], start: int, base: Floats, out: Floats) -> None:
    """Fill `out` with the sum of all deltas in rows from `start` on; `base` are the same rows of the base."""
    partial = deltas
    if deltas[0].everywhere:
        deltas[0].delta.rows(start, start + len(out), base, out=out)
        partial = deltas[1:]
    else:
        out[...] = 0
    for delta in partial:
        delta.add_to(out, start, base)


def _choose(choose: Chooser, start: int, block: _Block, output: Output) -> None:
    """Fill `block.stored` with one of the two neighbours of each sum."""
    import numpy as np

    from loratools.algebra.neighbours import float_neighbours
    from loratools.algebra.rounding import LARGEST, narrow

    exact = block.exact
    if float(np.abs(exact).max(initial=0)) > LARGEST[output.dtype]:
        refuse_not_finite(output, block.base, exact)
    low, high = float_neighbours(exact, output.dtype)
    np.copyto(block.moved, np.where(choose(start, exact, low, high), high, low))
    # On the grid already, so that nothing is rounded.
    narrow(block.moved, output.dtype, block.stored)


def _gain(only_delta: Delta | None, start: int, stop: int, block: _Block) -> Gain:
    """What became of the update in a block that has just been filled; `only_delta` is set where there is one."""
    import numpy as np

    moved = np.subtract(block.moved, block.base, out=block.moved)
    # The cheap way is a difference of large numbers where the deltas of several adapters cancel.
    energy = only_delta.energy(start, stop) if only_delta is not None else None
    energy = float(np.vdot(block.delta, block.delta)) if energy is None else energy
    changed = int(np.count_nonzero(np.not_equal(moved, 0, out=block.mask)))
    return Gain(float(np.vdot(moved, block.delta)), energy, moved.size - changed, moved.size)


def _cast(block: _Block, output: Output) -> None:
    """Fill `block.stored` with the base's values, or those that replace them, in another dtype."""
    import numpy as np

    from loratools.algebra.rounding import narrow

    narrow(block.base, output.dtype, block.stored, rounded=block.moved)
    finite = np.isfinite(block.base)
    if not np.isfinite(block.moved[finite]).all():
        refuse_not_finite(output, block.base[finite], block.base[finite])


def refuse_not_finite(output: Output, base: Floats, exact: Floats) -> NoReturn:
    """Say what is not finite: the base, the result, or only the sum of squares of the update."""
    import numpy as np

    from loratools.algebra.rounding import LARGEST

    if not np.isfinite(base).all():
        raise not_finite("the base", [output.name], DAMAGED)
    if np.isnan(exact).any():
        raise InputError(
            f"'{output.name}' would hold values that are not numbers",
            hint="look for an absurd alpha, or a vector of length zero that is divided by",
        )
    largest, limit = float(abs(exact).max()), LARGEST[output.dtype]
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
