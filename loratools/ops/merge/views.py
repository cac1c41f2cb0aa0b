"""Views of tensors through a place: what an update sees of the base, and what the base stores of a replaced weight."""

from __future__ import annotations

from loratools.naming.places import Part, Place
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import columns_of, reordered, reshaped, rows, transposed


def as_updated(values: LazyTensor, place: Place) -> LazyTensor:
    """What lies at `place` of the stored `values`, as the layer computes with it: the rectangle `place.of`."""
    view = _rectangle(values, place.at)
    if place.transposed:
        view = transposed(view)
    if place.order is not None:
        order = place.order(view.shape[0])
        view = reordered(view, tuple(sorted(range(len(order)), key=order.__getitem__)))
    return view


def as_stored(values: LazyTensor, place: Place) -> LazyTensor:
    """Of a whole weight, as the layer computes with it, what goes to `place`, as it is stored there."""
    view = _rectangle(values, place.of)
    if place.order is not None:
        view = reordered(view, tuple(place.order(view.shape[0]).tolist()))
    return transposed(view) if place.transposed else view


def _rectangle(values: LazyTensor, part: Part) -> LazyTensor:
    if part.expert is not None:
        expert = rows(values, part.expert, part.expert + 1)
        values = reshaped(expert, expert.shape[1:])
    if part.rows is not None:
        values = rows(values, part.rows.start, part.rows.stop)
    return columns_of(values, part.columns) if part.columns is not None else values
