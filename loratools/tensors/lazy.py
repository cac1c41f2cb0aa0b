"""LazyTensor: shape, dtype, and a promise to read the values, or a range of rows of them.

Headers are read first and values only where they are used, so a 70B checkpoint costs its headers.
Importing this file costs nothing: torch is imported where values are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loratools.tensors.dtypes import DTYPE_BITS, dtype_name
from loratools.tensors.files import ByteRange

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """Where the values of a LazyTensor come from. Sources are values: comparable, picklable, holding no open file."""

    @property
    def location(self) -> ByteRange | None:
        """The bytes on disk, where they are exactly the tensor's."""

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the first axis, in the stored dtype, contiguous and owned by the caller.

        A tensor of no axes has one row.
        """

    def scalar(self) -> float:
        """The value of a one-element tensor."""


@dataclass(frozen=True)
class LazyTensor:
    shape: tuple[int, ...]
    dtype: str
    source: Source

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.elements * DTYPE_BITS[self.dtype] + 7) // 8

    @property
    def location(self) -> ByteRange | None:
        return self.source.location

    def read(self) -> Tensor:
        """All values, in the stored dtype and in this tensor's shape."""
        if not self.shape:
            return self.source.read_rows(0, 1).reshape(())
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Values of rows start:stop, shape (stop - start, *shape[1:])."""
        return self.source.read_rows(start, stop).reshape(stop - start, *self.shape[1:])

    def scalar(self) -> float:
        """The value of a one-element tensor; of a tensor in a file without importing torch."""
        if self.elements != 1:
            raise ValueError(f"shape {self.shape} is no scalar")
        return self.source.scalar()


@dataclass(frozen=True, eq=False)
class _Held:
    """Values in memory."""

    values: Tensor

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        rows = self.values.reshape(1) if self.values.dim() == 0 else self.values
        return rows[start:stop].clone()

    def scalar(self) -> float:
        return float(self.values.double().item())


def held(values: Tensor) -> LazyTensor:
    """A tensor in memory, as a LazyTensor."""
    return LazyTensor(tuple(values.shape), dtype_name(values.dtype), _Held(values))
