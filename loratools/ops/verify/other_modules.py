"""Whether the change of a weight is what the adapter has for another one: layers shifted, queries and keys exchanged.

A hypothesis is reported if rounding explains the rest of `merged - base` without the other delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from loratools.ops.merge.outputs import Output
from loratools.ops.verify.cause import Cause
from loratools.ops.verify.diagnosis import leaves_at_most, rounding_allowance
from loratools.ops.verify.fit import Fit
from loratools.short_repr import counted
from loratools.tensors.lazy import LazyTensor

# Of so many weights in a row that have the delta of no other one, the rest is taken to have none either.
_MOST_WITHOUT = 8


class UnexplainedWeight(NamedTuple):
    """A weight whose change is not that of its own update: what it should be, what is stored, and its sums."""

    output: Output
    merged: LazyTensor
    fit: Fit


class _Position(NamedTuple):
    """Where a weight is in a model: its layer (None if it is in none), and its name within a layer."""

    layer: int | None
    name: str


def deltas_of_other_modules(
    weights: Sequence[UnexplainedWeight], outputs: Sequence[Output], sample: float
) -> dict[str, Cause]:
    """For each weight that was changed by the delta of another one, its name and what that says.

    Args:
        weights: The weights that nothing has explained.
        outputs: What all weights should be that adapters change.
        sample: The share of the rows to look at.
    """
    at = {_position(output.name): output for output in outputs}
    causes: dict[str, Cause] = {}
    # How the other one lies to a weight that was explained: so it mostly lies to the next as well.
    known: list[_Displacement] = []
    without = 0
    for weight in weights:
        if without == _MOST_WITHOUT:
            break
        without += 1
        for displacement in dict.fromkeys([*known, *_displacements(weight.output, at)]):
            other = displacement.of(weight.output, at)
            if other is not None and _has_delta_of(other, weight, sample):
                causes[weight.output.name] = displacement.cause(_position(weight.output.name))
                known = list(dict.fromkeys([displacement, *known]))
                without = 0
                break
    return causes


class _Displacement(NamedTuple):
    """From a weight to the one whose delta it has: so many layers further, or the weight of a name in its layer."""

    layers: int = 0
    name: str | None = None

    def of(self, output: Output, at: Mapping[_Position, Output]) -> Output | None:
        """The other weight, where there is one of the same shape."""
        layer, name = _position(output.name)
        if layer is None and self.layers:
            return None
        other = at.get(_Position(None if layer is None else layer + self.layers, self.name or name))
        return other if other is not None and other is not output and other.shape == output.shape else None

    def cause(self, position: _Position) -> Cause:
        if self.name is None:
            distance = f"{counted(abs(self.layers), 'layer')} {'further on' if self.layers > 0 else 'before'}"
            return Cause("other-module", f"the delta of another layer was added: {distance}")
        return Cause("other-module", f"the delta of {_module(self.name)} was added to {_module(position.name)}")


def _displacements(output: Output, at: Mapping[_Position, Output]) -> Iterator[_Displacement]:
    """Other weights of the same shape that are nearest: those of the same layer, then those of the same name."""
    layer, name = _position(output.name)
    for other in at:
        if other.layer == layer and other.name != name:
            yield _Displacement(name=other.name)
    if layer is not None:
        same_name = [other.layer - layer for other in at if other.name == name and other.layer is not None]
        yield from (_Displacement(offset) for offset in sorted(same_name, key=abs) if offset)


def _has_delta_of(other: Output, weight: UnexplainedWeight, sample: float) -> bool:
    places = [update.place for update in weight.output.updates]
    if len(places) != len(other.updates) or [update.adapter for update in other.updates] != [
        update.adapter for update in weight.output.updates
    ]:
        return False
    updates = tuple(replace(update, place=place) for update, place in zip(other.updates, places, strict=True))
    supposed = replace(weight.output, updates=updates)
    return leaves_at_most(rounding_allowance(weight.output, weight.fit), supposed, weight.merged, sample)


def _position(name: str) -> _Position:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return _Position(None, name)
    return _Position(int(parts[number]), ".".join([*parts[:number], "*", *parts[number + 1 :]]))


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
