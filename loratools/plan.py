"""What a verb will do, worked out from headers alone: outputs, and the work units that make them.

A plan is data: it can be printed (`--plan`), compared, and run by any of `execution/`.
Every work unit owns byte ranges that no other unit writes, so units run in any order, on any worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.tensors import DTYPE_BITS, ByteRange, LazyTensor
from loratools.updates import Update


@dataclass(frozen=True)
class WeightedUpdate:
    """An update on its way into a weight: whose it is, times what, and how the base stores the weight."""

    adapter: int
    update: Update
    weight: float
    transposed: bool


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    values    what it is made from: the base's tensor, or the adapter's replacement
    updates   what is added to it; none for a tensor that is only copied, cast or put in place
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: LazyTensor
    updates: tuple[WeightedUpdate, ...] = ()
    replaced_by: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.columns * DTYPE_BITS[self.dtype] // 8

    @property
    def copied(self) -> ByteRange | None:
        """Where its bytes lie ready to be copied; None where they must be computed."""
        same = not self.updates and self.dtype == self.values.dtype and self.shape == self.values.shape
        return self.values.location if same else None

    @property
    def touched(self) -> bool:
        return bool(self.updates) or self.replaced_by is not None


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the result, its tensors in the order in which they are stored."""

    name: str
    metadata: Mapping[str, str]
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class CopyUnit:
    """Bytes start:stop of an output, which go over as they are from `source`."""

    file: int
    output: Output
    source: ByteRange
    start: int
    stop: int


@dataclass(frozen=True)
class RowsUnit:
    """Rows start:stop of an output, to be computed."""

    file: int
    output: Output
    start: int
    stop: int


WorkUnit = CopyUnit | RowsUnit


@dataclass(frozen=True)
class PlannedFile:
    """A file beside the weights: copied from `source`, or written with the given `text`. `origin`: whose it is."""

    name: str
    source: Path | None = None
    text: str | None = None
    origin: str = "base"
