"""Tensors made of several: concatenated rows, and matrices of blocks that are zero elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor, from_torch

if TYPE_CHECKING:
    from torch import Tensor


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The rows of all tensors, concatenated. Tensors of several dtypes become float32, or float64 if one of them is."""
    if len({part.dtype for part in parts}) > 1:
        import torch

        wide = torch.float64 if any(part.dtype == "F64" for part in parts) else torch.float32
        return from_torch(torch.cat([part.read().double() for part in parts]).to(wide))
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, _Stacked(tuple(parts)))


def block_matrix(
    shape: tuple[int, int], blocks: Sequence[tuple[int, int, LazyTensor]], factors: Sequence[float] | None = None
) -> LazyTensor:
    """A matrix that is zero except for blocks, which do not overlap.

    Args:
        shape: The shape of the matrix.
        blocks: The first row and column of each block, and its values.
        factors: What each block is multiplied by; 1 if empty. Products, and blocks of several dtypes, become float32,
            or float64 if one of the blocks is.
    """
    for row, column, block in blocks:
        if len(block.shape) != 2 or row + block.shape[0] > shape[0] or column + block.shape[1] > shape[1]:
            raise ValueError(f"a block {block.shape} at {row}, {column} is not inside {shape}")
    scales = tuple(factors or [1.0] * len(blocks))
    dtypes = {block.dtype for _, _, block in blocks}
    exact = len(dtypes) == 1 and all(scale == 1 for scale in scales)
    dtype = next(iter(dtypes)) if exact else "F64" if "F64" in dtypes else "F32"
    return LazyTensor(shape, dtype, _BlockMatrix(tuple(blocks), scales, shape[1], dtype))


def block_diagonal(blocks: Sequence[LazyTensor | int], factors: Sequence[float] | None = None) -> LazyTensor:
    """A block-diagonal matrix.

    Args:
        blocks: Matrices, (rows, columns) each, or a number of rows that are zero in all columns.
        factors: What each matrix is multiplied by, as in `block_matrix`.
    """
    positioned = []
    row = column = 0
    for block in blocks:
        if isinstance(block, int):
            row += block
        else:
            positioned.append((row, column, block))
            row, column = row + block.shape[0], column + block.shape[1]
    return block_matrix((row, column), positioned, factors)


@dataclass(frozen=True)
class _BlockMatrix:
    blocks: tuple[tuple[int, int, LazyTensor], ...]
    factors: tuple[float, ...]
    columns: int
    dtype: str

    @property
    def of(self) -> tuple[LazyTensor, ...]:
        return tuple(block for _, _, block in self.blocks)

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        out = torch.zeros(stop - start, self.columns, dtype=torch_dtype(self.dtype))
        for (row, column, block), factor in zip(self.blocks, self.factors, strict=True):
            first, last = max(start, row), min(stop, row + block.shape[0])
            if first < last:
                values = block.read_rows(first - row, last - row)
                out[first - start : last - start, column : column + block.shape[1]] = (
                    values if factor == 1 else values.double() * factor
                )
        return out

    def scalar(self) -> float:
        return float(self.read_rows(0, 1).double().item())


@dataclass(frozen=True)
class _Stacked:
    parts: tuple[LazyTensor, ...]

    @property
    def of(self) -> tuple[LazyTensor, ...]:
        return self.parts

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        pieces, at = [], 0
        for part in self.parts:
            first, last = max(start, at), min(stop, at + part.shape[0])
            if first < last:
                pieces.append(part.read_rows(first - at, last - at))
            at += part.shape[0]
        return torch.cat(pieces) if pieces else self.parts[0].read_rows(0, 0)

    def scalar(self) -> float:
        return float(self.read_rows(0, 1).double().item())
