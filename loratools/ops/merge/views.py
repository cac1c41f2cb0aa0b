"""Views of tensors through a place: what an update sees of the base, and what the base stores of a replaced weight."""

from __future__ import annotations

from loratools.naming.places import Part, Place
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import columns_of, reordered, reshaped, rows, transposed


def as_updated(values: LazyTensor, place: Place) -> LazyTensor:
    """What lies at `place` of the stored `values`, as the layer computes with it: the rectangle `place.of`."""
    found = _rectangle(values, place.at)
    if place.transposed:
        found = transposed(found)
    if place.order is not None:
        order = place.order(found.shape[0])
        found = reordered(found, tuple(sorted(range(len(order)), key=order.__getitem__)))
    return found


def as_stored(values: LazyTensor, place: Place) -> LazyTensor:
    """Of a whole weight, as the layer computes with it, what goes to `place`, as it is stored there."""
    found = _rectangle(values, place.of)
    if place.order is not None:
        found = reordered(found, tuple(place.order(found.shape[0]).tolist()))
    return transposed(found) if place.transposed else found


def _rectangle(values: LazyTensor, part: Part) -> LazyTensor:
    if part.expert is not None:
        one = rows(values, part.expert, part.expert + 1)
        values = reshaped(one, one.shape[1:])
    if part.rows is not None:
        values = rows(values, part.rows.start, part.rows.stop)
    return columns_of(values, part.columns) if part.columns is not None else values
