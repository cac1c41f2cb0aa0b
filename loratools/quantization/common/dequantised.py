"""Dequantised: the values of a packed weight as a LazyTensor, read by rows like any other tensor."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.protocol import PackedWeight
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.rounding import Floats


@dataclass(frozen=True)
class Dequantised:
    """The source of the dequantised values of a packed weight. No byte range in a file holds them."""

    weight: PackedWeight

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_floats(self, start: int, stop: int) -> Floats:
        """Rows start:stop as float32, which holds the values of every dtype of packed weights."""
        import numpy as np

        weight = self.weight
        rows = weight.shape[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {rows}")
        step = weight.row_block
        if step == 1 or (start % step == 0 and (stop % step == 0 or stop == rows) and stop - start <= step):
            return weight.parameters.dequantise(weight, start, stop)
        values: Floats = np.empty((stop - start, *weight.shape[1:]), np.float32)
        for first in range(start - start % step, stop, step):
            block = _last_block.of(weight, first, min(first + step, rows))
            low, high = max(first, start), min(first + step, stop)
            values[low - start : high - start] = block[low - first : high - first]
        return values

    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        return torch.from_numpy(self.read_floats(start, stop)).to(torch_dtype(self.weight.dtype))

    def scalar(self) -> float:
        return float(self.read_floats(0, 1).item())


class _LastBlock(threading.local):
    """The block of rows that each thread unpacked last: rows are read in order, a few at a time, and some layouts
    unpack many rows or all of them at once.
    """

    weight: PackedWeight | None = None
    start: int = 0
    values: Floats

    def of(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        if self.weight is not weight or self.start != start:
            self.values = weight.parameters.dequantise(weight, start, stop)
            self.weight, self.start = weight, start
        return self.values


_last_block = _LastBlock()


def dequantised(weight: PackedWeight) -> LazyTensor:
    """The logical weight: its shape and dtype, and values that are unpacked on access."""
    return LazyTensor(weight.shape, weight.dtype, Dequantised(weight))
