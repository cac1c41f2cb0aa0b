"""Views of tensors through a place: what an update sees of the base, and what the base stores of a replaced weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.naming.places import Part, Place
from loratools.tensors import ByteRange, LazyTensor, Span, columns_of, reshaped, rows_of, transposed

if TYPE_CHECKING:
    from torch import Tensor


def as_updated(values: LazyTensor, place: Place) -> LazyTensor:
    """What lies at `place` of the stored `values`, as the layer computes with it: the rectangle `place.of`."""
    found = _rectangle(values, place.at)
    if place.transposed:
        found = transposed(found)
    if place.order is not None:
        found = LazyTensor(found.shape, found.dtype, _Ordered(found, place))
    return found


def as_stored(values: LazyTensor, place: Place) -> LazyTensor:
    """Of a whole weight, as the layer computes with it, what goes to `place`, as it is stored there."""
    found = _rectangle(values, place.of)
    if place.order is not None:
        found = LazyTensor(found.shape, found.dtype, _Ordered(found, place, back=True))
    return transposed(found) if place.transposed else found


def _rectangle(values: LazyTensor, part: Part) -> LazyTensor:
    if part.expert is not None:
        one = rows_of(values, Span(part.expert, part.expert + 1))
        values = reshaped(one, one.shape[1:])
    if part.rows is not None:
        values = rows_of(values, part.rows)
    return columns_of(values, part.columns) if part.columns is not None else values


@dataclass(frozen=True)
class _Ordered:
    of: LazyTensor
    place: Place
    back: bool = False

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        import numpy as np
        import torch

        assert self.place.order is not None
        order = self.place.order(self.of.shape[0])
        order = order if self.back else np.argsort(order)
        return self.of.read()[torch.from_numpy(order[start:stop].copy())]

    def scalar(self) -> float:
        return self.of.scalar()
