"""Tensors made of several: rows below each other, and blocks on a diagonal."""

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
    """The rows of all, one below the other. Parts of several dtypes become float32, or float64 if one of them is."""
    if len({part.dtype for part in parts}) > 1:
        import torch

        wide = torch.float64 if any(part.dtype == "F64" for part in parts) else torch.float32
        return from_torch(torch.cat([part.read().double() for part in parts]).to(wide))
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, _Stacked(tuple(parts)))


def block_diagonal(blocks: Sequence[LazyTensor], factors: Sequence[float] | None = None) -> LazyTensor:
    """Matrices on the diagonal of one that is zero elsewhere.

    Args:
        blocks: each (rows, columns).
        factors: what each is multiplied with, 1 where there are none. Products are float32, or float64 if a block is.
    """
    scales = tuple(factors or [1.0] * len(blocks))
    dtypes = {block.dtype for block in blocks}
    changed = len(dtypes) > 1 or any(scale != 1 for scale in scales)
    dtype = ("F64" if "F64" in dtypes else "F32") if changed else blocks[0].dtype
    shape = (sum(block.shape[0] for block in blocks), sum(block.shape[1] for block in blocks))
    return LazyTensor(shape, dtype, _BlockDiagonal(tuple(blocks), scales, shape[1], dtype))


@dataclass(frozen=True)
class _BlockDiagonal:
    blocks: tuple[LazyTensor, ...]
    factors: tuple[float, ...]
    columns: int
    dtype: str

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        out = torch.zeros(stop - start, self.columns, dtype=torch_dtype(self.dtype))
        row = column = 0
        for block, factor in zip(self.blocks, self.factors, strict=True):
            first, last = max(start, row), min(stop, row + block.shape[0])
            if first < last:
                values = block.read_rows(first - row, last - row)
                out[first - start : last - start, column : column + block.shape[1]] = (
                    values if factor == 1 else values.double() * factor
                )
            row, column = row + block.shape[0], column + block.shape[1]
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
