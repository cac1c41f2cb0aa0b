"""The usual recipe, tried first: a weight is merged again, block by block, and its stored bits are compared.

Nearly every merge is explained by it, so this pass is as cheap as a merge: memory is reused, a block stays in one
core's cache, and the bits of all of its values are compared at once. Only where bits differ are single values looked
at: halves that are rounded to even, and sums that were added up in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rows import read_rows, total_delta
from loratools.ops.verify.deltas import Deltas, blocks
from loratools.ops.verify.explanation import explains_at
from loratools.ops.verify.fit import Sums
from loratools.ops.verify.recipes import Recipe
from loratools.storage.arrays import read_raw
from loratools.storage.files import reading
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# So many blocks of a weight, spread over all of it, are summed up for its gain: they have hundreds of thousands of
# values.
_MEASURED = 8
# Half of the spacing of bfloat16 numbers, in the bits of a float32.
_HALF = 0x8000


def is_merged_again(
    usual: Recipe, output: Output, stored: LazyTensor, deltas: Deltas, sample: float, sums: Sums
) -> bool:
    """Whether the usual recipe explains every block; what is needed for the fit is added to `sums`.

    Args:
        usual: The recipe that rounds the sum of base and deltas once.
        output: What the weight should be.
        stored: The weight of the merged model, as a matrix.
        deltas: The deltas of the weight.
        sample: The share of the rows to look at.
        sums: Takes some blocks.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, widen

    ranges = list(blocks(output, sample))
    every = max(1, len(ranges) // _MEASURED)
    block = _Block(output, deltas.dtype, 0)
    together = deltas.together
    with _base_rows(output, deltas.dtype) as read_base, _merged_rows(stored) as read_merged:
        for i, (start, stop) in enumerate(ranges):
            if len(block.base) != stop - start:
                block = _Block(output, deltas.dtype, stop - start)
            read_base(start, block)
            read_merged(start, block)
            measured = i % every == 0
            parts = deltas.rows(start, stop, block.base) if measured else []
            if len(parts) == 1:
                np.copyto(block.delta, parts[0])
            else:
                total_delta(together, start, block.base, block.delta)
            wrong = _different(output.dtype, block)
            if not measured and wrong is None:
                continue
            values = np.empty(block.base.shape, STORAGE[deltas.dtype])
            widen(block.merged, output.dtype, values)
            parts = parts or deltas.rows(start, stop, block.base)
            if wrong is not None and not explains_at(usual, deltas, start, block.base, parts, values, wrong):
                return False
            if measured:
                sums.add(block.base, parts, values)
    return True


class _Block:
    """Memory for one block of rows, used again for the next.

    raw, merged   base and merged model as they are read     base       the base in the dtype of the sums
    delta         what is added, then the sum                written    the sum as it is stored
    """

    def __init__(self, output: Output, dtype: str, rows: int) -> None:
        import numpy as np

        from loratools.algebra.rounding import STORAGE

        shape = (rows, output.columns)
        stored = np.dtype(STORAGE[output.dtype])
        if output.values.location is not None:
            self.raw = np.empty(shape, STORAGE[output.values.dtype])
            self.raw_buffer = self.raw.reshape(-1).view(np.uint8).data
        self.base, self.delta = (np.empty(shape, STORAGE[dtype]) for _ in range(2))
        # Compared as memory, which is faster than number by number.
        self._merged_bytes, self._written_bytes = (bytearray(math.prod(shape) * stored.itemsize) for _ in range(2))
        self.merged_buffer = memoryview(self._merged_bytes)
        self.merged = np.frombuffer(self._merged_bytes, stored).reshape(shape)
        self.written = np.frombuffer(self._written_bytes, stored).reshape(shape)
        self._bits = np.dtype(f"u{stored.itemsize}")

    def is_same(self) -> bool:
        """Whether the sum, as it is stored, has the bits of the merged model."""
        return self._written_bytes == self._merged_bytes

    def where_different(self) -> NDArray[np.intp]:
        """The places where it has not."""
        import numpy as np

        return np.flatnonzero(self.written.view(self._bits) != self.merged.view(self._bits))


def _different(dtype: str, block: _Block) -> NDArray[np.intp] | None:
    """The places of a block where base and delta, rounded once, are not the bits of the merged model; None: nowhere.

    Afterwards `block.delta` has no meaning.
    """
    import numpy as np

    from loratools.algebra.rounding import narrow

    exact = np.add(block.base, block.delta, out=block.delta)
    # Bits alone do not tell a NaN from a half; this sum is no number, or infinite, where any value is.
    if dtype != "BF16" or exact.dtype != np.float32 or not float(np.vdot(exact, exact)) < math.inf:
        narrow(exact, dtype, block.written)
        return None if block.is_same() else block.where_different()
    bits = exact.view(np.uint32)
    bits += _HALF
    np.right_shift(bits, 16, out=block.written, dtype=np.uint32, casting="same_kind")
    if block.is_same():
        return None
    # All halves were rounded up: those that are even below were to be rounded down.
    places = block.where_different()
    sums = (bits.reshape(-1)[places] - _HALF).view(np.float32)
    rounded = np.empty(len(places), np.uint16)
    narrow(sums, dtype, rounded)
    places = places[rounded != block.merged.reshape(-1)[places]]
    return places if places.size else None


@contextmanager
def _base_rows(output: Output, dtype: str) -> Iterator[Callable[[int, _Block], None]]:
    """A function that fills the `base` of a block with the values of the rows from a given one on."""
    import numpy as np

    from loratools.algebra.rounding import widen

    place = output.values.location
    if place is None or output.patches:

        def read(start: int, block: _Block) -> None:
            np.copyto(block.base, read_rows(output, dtype, start, start + len(block.base)))

        yield read
        return
    with reading(place) as read_bytes:

        def read(start: int, block: _Block) -> None:
            read_bytes(start * block.raw.nbytes // len(block.raw), block.raw_buffer)
            widen(block.raw, output.values.dtype, block.base)

        yield read


@contextmanager
def _merged_rows(stored: LazyTensor) -> Iterator[Callable[[int, _Block], None]]:
    """A function that fills the `merged` of a block with the stored numbers of the rows from a given one on."""
    import numpy as np

    if stored.location is None:

        def read(start: int, block: _Block) -> None:
            np.copyto(block.merged, read_raw(stored, start, start + len(block.merged)).view(block.merged.dtype))

        yield read
        return
    with reading(stored.location) as read_bytes:

        def read(start: int, block: _Block) -> None:
            read_bytes(start * block.merged.nbytes // len(block.merged), block.merged_buffer)

        yield read
