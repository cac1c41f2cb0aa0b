"""Views of lazy tensors: transposed, sliced, reshaped, reordered. A view reads values and never computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.tensors.dtypes import DTYPE_BITS, FLOAT8_DTYPES, torch_dtype
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Every `step`-th index of start:stop along one axis."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop, self.step)


class _View:
    """The source of a view. Views are equal if they view equal tensors in the same way.

    These are not dataclasses: creating those takes as long as reading a header, at every start of the program.
    """

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, _View) and other._arguments == self._arguments

    def __hash__(self) -> int:
        return hash((type(self), self._arguments))

    @property
    def of(self) -> tuple[LazyTensor, ...]:
        return tuple(argument for argument in self._arguments if isinstance(argument, LazyTensor))

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def scalar(self) -> float:
        return float(self.read_rows(0, 1).double().item())


class _Transposed(_View):
    def read_rows(self, start: int, stop: int) -> Tensor:
        (of,) = self._arguments
        values: Tensor = of.read()[:, start:stop].T.contiguous()
        return values


class _Rows(_View):
    @property
    def location(self) -> ByteRange | None:
        of, first, last = self._arguments
        location: ByteRange | None = of.location
        row_bits = math.prod(of.shape[1:]) * DTYPE_BITS[of.dtype]
        if location is None or row_bits % 8:
            return None
        return ByteRange(location.file, location.offset + first * row_bits // 8, (last - first) * row_bits // 8)

    def read_rows(self, start: int, stop: int) -> Tensor:
        of, first, _ = self._arguments
        values: Tensor = of.read_rows(first + start, first + stop)
        return values


class _Columns(_View):
    def read_rows(self, start: int, stop: int) -> Tensor:
        of, span = self._arguments
        values: Tensor = of.read_rows(start, stop)[:, span.slice].contiguous()
        return values


class _OrderedColumns(_View):
    def read_rows(self, start: int, stop: int) -> Tensor:
        of, order = self._arguments
        values: Tensor = of.read_rows(start, stop)[:, list(order)]
        return values


class _Reshaped(_View):
    @property
    def location(self) -> ByteRange | None:
        location: ByteRange | None = self._arguments[0].location
        return location

    def read_rows(self, start: int, stop: int) -> Tensor:
        of, shape = self._arguments
        size, inner = math.prod(shape[1:]), math.prod(of.shape[1:])
        values: Tensor
        if not size or not inner or not shape:
            values = of.read().reshape(shape or (1,))[start:stop]
            return values
        first, last = start * size // inner, -(-stop * size // inner)
        skipped = start * size - first * inner
        values = of.read_rows(first, last).flatten()[skipped : skipped + (stop - start) * size]
        return values

    def scalar(self) -> float:
        return float(self._arguments[0].scalar())


class _Reordered(_View):
    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        of, order = self._arguments
        row_numbers = order[start:stop]
        if 2 * len(row_numbers) >= of.shape[0]:
            values: Tensor = of.read()[list(row_numbers)]
            return values
        pieces = [of.read_rows(first, last) for first, last in _runs(row_numbers)]
        return torch.cat(pieces) if pieces else of.read_rows(0, 0)


class _Float16(_View):
    def read_rows(self, start: int, stop: int) -> Tensor:
        values: Tensor = self._arguments[0].read_rows(start, stop).to(torch_dtype("F16"))
        return values


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Indices as contiguous ranges: the first, and one past the last."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def transposed(tensor: LazyTensor) -> LazyTensor:
    """View of a matrix (rows, columns) as (columns, rows). Any range of its rows reads the whole matrix."""
    rows, columns = tensor.shape
    return LazyTensor((columns, rows), tensor.dtype, _Transposed(tensor))


def rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """View of rows start:stop of the first axis; it has a byte range in the file if the tensor has one."""
    if not 0 <= start <= stop <= tensor.shape[0]:
        raise IndexError(f"rows {start}:{stop} of {tensor.shape[0]}")
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    return LazyTensor((stop - start, *tensor.shape[1:]), tensor.dtype, _Rows(tensor, start, stop))


def columns_of(tensor: LazyTensor, span: Span) -> LazyTensor:
    """View of some columns, along the second axis. Reading rows of it reads whole rows of the tensor."""
    rows, columns, *inner = tensor.shape
    if span == Span(0, columns):
        return tensor
    return LazyTensor((rows, len(span), *inner), tensor.dtype, _Columns(tensor, span))


def columns_in_order(tensor: LazyTensor, order: tuple[int, ...]) -> LazyTensor:
    """View of columns of a matrix, given by their indices in any order. Whole rows are read."""
    return LazyTensor((tensor.shape[0], len(order)), tensor.dtype, _OrderedColumns(tensor, order))


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """View of the same values, in the same order, with another shape of equal size."""
    if shape == tensor.shape:
        return tensor
    if math.prod(shape) != tensor.elements:
        raise ValueError(f"{tensor.shape} has no view of shape {shape}")
    return LazyTensor(shape, tensor.dtype, _Reshaped(tensor, shape))


def reordered(tensor: LazyTensor, order: tuple[int, ...]) -> LazyTensor:
    """View of rows, given by their indices in any order. If there are many, the whole tensor is read."""
    return LazyTensor((len(order), *tensor.shape[1:]), tensor.dtype, _Reordered(tensor, order))


def in_float16(tensor: LazyTensor) -> LazyTensor:
    """View of 8-bit numbers as float16, which represents all of them exactly."""
    if tensor.dtype not in FLOAT8_DTYPES:
        raise ValueError(f"{tensor.dtype} has no exact view in float16")
    return LazyTensor(tensor.shape, "F16", _Float16(tensor))
