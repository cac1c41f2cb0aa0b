"""What a verb will do, worked out from headers alone: outputs, and the work units that make them.

A plan is data: it can be printed (`--plan`), compared, and run by any of `execution/`.
Every work unit owns byte ranges that no other unit writes, so units run in any order, on any worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loratools.naming.places import Place
from loratools.ops.merge.rounding import NEAREST, Rounding
from loratools.quantization.common.protocol import PackedWeight
from loratools.storage.gguf_reader import GgufHeader
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update


@dataclass(frozen=True)
class WeightedUpdate:
    """An update on its way into a weight: whose it is, times what, and where in the stored tensor it goes."""

    adapter: int
    update: Update
    weight: float
    place: Place


@dataclass(frozen=True)
class RowsReplaced:
    """Rows of a tensor that an adapter replaces: `values: (len(rows), ...)`."""

    adapter: int
    rows: tuple[int, ...]
    values: LazyTensor


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    values    what it is made from: the base's tensor, or the adapter's replacement
    updates   what is added to it; none for a tensor that is only copied, cast or put in place
    patches   rows of `values` that are replaced before anything is added
    rounding  how the sums are brought onto the grid of the stored dtype
    requantised   of the packed numbers of a quantised weight: the weight that is merged to give them
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: LazyTensor
    updates: tuple[WeightedUpdate, ...] = ()
    patches: tuple[RowsReplaced, ...] = ()
    replaced_by: int | None = None
    rounding: Rounding = NEAREST
    requantised: Requantised | None = None

    @property
    def merged(self) -> Output:
        """The weight as the model has it: of packed numbers the one that they stand for, else itself."""
        return self.requantised.output if self.requantised is not None else self

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    # Asked for at every block of rows: kept, or asking costs as much as a tenth of the sums.
    @cached_property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns as which it is merged: those of all experts one below the other, where it holds several."""
        experts = any(u.place.at.expert is not None for u in self.updates)
        axes = 2 if experts else min(1, len(self.shape))
        return math.prod(self.shape[:axes]), math.prod(self.shape[axes:])

    @property
    def rows(self) -> int:
        return self.matrix[0]

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return self.matrix[1]

    @property
    def needs_whole(self) -> bool:
        """Whether an update of it has to see all of it first, or makes all of its delta at once (`whole_delta`), which
        it would do again for every piece."""
        return any(u.update.needs_base or u.update.whole_delta for u in self.updates)

    @property
    def in_one_piece(self) -> bool:
        """Whether it is merged in one piece: where it `needs_whole`, or rounding carries errors from row to row."""
        return self.needs_whole or self.requantised is not None or (self.rounding.feeds_back and self.inputs_along_rows)

    @cached_property
    def inputs_along_rows(self) -> bool:
        """Whether the inputs of the layer are along the rows of the matrix, as of a weight stored (in, out)."""
        return any(u.place.transposed for u in self.updates)

    @cached_property
    def row_bytes(self) -> int:
        return self.columns * DTYPE_BITS[self.dtype] // 8

    @property
    def copied(self) -> ByteRange | None:
        """Where its bytes lie ready to be copied; None if they must be computed."""
        changed = bool(self.updates or self.patches or self.requantised)
        is_stored_so = self.dtype == self.values.dtype and self.shape == self.values.shape
        return self.values.location if is_stored_so and not changed else None

    @property
    def touched(self) -> bool:
        return bool(self.updates or self.patches or self.requantised) or self.replaced_by is not None


@dataclass(frozen=True)
class Requantised:
    """A packed weight that is merged on the grid of its scheme.

    output   the weight as the model has it, with what is added to it
    weight   its stored parts, of which the first changes
    retyped  whether that is another type than the base's, with scales of its own
    """

    output: Output
    weight: PackedWeight
    retyped: bool = False

    @property
    def scheme(self) -> str:
        """The scheme and its numbers: `bitsandbytes: nf4`."""
        return f"{self.weight.scheme}: {self.weight.parameters.format}"


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the result, its tensors in the order in which they are stored.

    Attributes:
        name: The name of the file, relative to the result.
        metadata: The texts of its header.
        outputs: Its tensors.
        prefix: What their names lose on their way into the file (`unet.`, of a component of a pipeline).
        index: The file that says which of its fellows has which tensor; None if there is none.
        gguf: The header of the base's file where that is GGUF, which this one is then as well.
    """

    name: str
    metadata: Mapping[str, str]
    outputs: tuple[Output, ...]
    prefix: str = ""
    index: str | None = None
    gguf: GgufHeader | None = None

    def stored_name(self, output: Output) -> str:
        return output.name.removeprefix(self.prefix)

    @cached_property
    def stored_names(self) -> tuple[str, ...]:
        """The names of its tensors in the file, in their order."""
        return tuple(output.name.removeprefix(self.prefix) for output in self.outputs)


@dataclass(frozen=True)
class CopyUnit:
    """Bytes that go over as they are: of one tensor, or of several that lie side by side in both files.

    Attributes:
        file: The number of the output file.
        source: Where the bytes are.
        target: Where they go, from the start of the output file.
    """

    file: int
    source: ByteRange
    target: int


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
