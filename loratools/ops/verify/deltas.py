"""The deltas of one weight, adapter by adapter and all together, and the blocks of rows in which they are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rows import AddedDelta, compute_dtype, prepared
from loratools.updates.parts.deltas import FactorDelta, joined

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# As of a merge: base, deltas, sum and result of a block stay in one core's cache.
_BLOCK_ELEMENTS = 48 << 10


class Deltas:
    """The deltas of one weight, one for each adapter that changes it."""

    def __init__(self, output: Output, dtype: str | None = None) -> None:
        self.adapters = tuple(dict.fromkeys(sorted(update.adapter for update in output.updates)))
        self.output = output
        self.dtype = dtype or compute_dtype(output)
        self._added = [prepared(self._of(adapter), self.dtype, 0, output.rows) for adapter in self.adapters]

    def _of(self, adapter: int) -> Output:
        return replace(self.output, updates=tuple(u for u in self.output.updates if u.adapter == adapter))

    @cached_property
    def together(self) -> Sequence[AddedDelta]:
        """What is added of all adapters, as a merge adds it: products that go everywhere as a single one."""
        added = [part for group in self._added for part in group]
        products = [p.delta for p in added if p.everywhere and isinstance(p.delta, FactorDelta)]
        if len(products) < 2:
            return sorted(added, key=lambda p: not p.everywhere)
        partial = [p for p in added if not (p.everywhere and isinstance(p.delta, FactorDelta))]
        return [AddedDelta(joined(products), 0, self.output.rows, slice(None), True), *partial]

    @property
    def terms(self) -> int:
        """Products summed in one entry, over all adapters."""
        return sum(delta.terms for group in self._added for delta in group)

    def rows(self, start: int, stop: int, base: Floats) -> list[Floats]:
        """Rows start:stop of each delta, (stop - start, columns)."""
        return [_rows(group, start, base) for group in self._added]

    def magnitude(self, start: int, base: Floats) -> Floats:
        """What rounding errors of these rows are proportional to, over all adapters."""
        import numpy as np

        total = np.zeros_like(base)
        for delta in (p for group in self._added for p in group):
            delta.add_magnitude_to(total, start, base)
        return total


def _rows(group: Sequence[AddedDelta], start: int, base: Floats) -> Floats:
    import numpy as np

    if len(group) == 1 and group[0].everywhere:
        return group[0].delta.rows(start, start + len(base), base)
    total = np.zeros_like(base)
    for delta in group:
        delta.add_to(total, start, base)
    return total


def blocks(output: Output, sample: float = 1.0) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together are the share `sample` of all, spread evenly; at least one."""
    step = max(1, _BLOCK_ELEMENTS // max(1, output.columns))
    starts = range(0, output.rows, step)
    every = max(1, round(1 / sample))
    for start in starts[::every]:
        yield start, min(start + step, output.rows)
