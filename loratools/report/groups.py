"""Many names as few: `model.layers.0.q_proj` ... `model.layers.31.q_proj` -> `model.layers.{0-31}.q_proj`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Generic, TypeVar

from loratools.report.text import safe

_Item = TypeVar("_Item")

# A number that is a whole part of the name, between dots, underscores or colons. At most nine digits, so that a
# hostile name costs nothing to parse; no leading zeros, so that two names never fall together.
_INDEX = re.compile(r"(?<![^._:])(0|[1-9][0-9]{0,8})(?![^._:])")
# A run of fewer is longer written as a range than as a list.
_SHORTEST_RUN = 3
_SHORTEST_STEPPED_RUN = 4


@dataclass(frozen=True)
class Group(Generic[_Item]):
    """Items whose names differ in numbers alone and that are alike otherwise.

    `name`: all names of the group in one, safe to print. `items` in natural order.
    """

    name: str
    items: tuple[_Item, ...]


def grouped(items: Iterable[tuple[str, Hashable, _Item]]) -> list[Group[_Item]]:
    """Join items `(name, likeness, item)` whose names differ in numbers alone and that are alike.

    A group stands for exactly the names that its name spells: where the numbers are not a full grid, there are several
    groups. Groups come in natural order, layer 2 before layer 10.
    """
    families: dict[tuple[tuple[str, ...], Hashable], dict[tuple[int, ...], _Item]] = {}
    for name, likeness, item in items:
        pieces = _INDEX.split(name)
        families.setdefault((tuple(pieces[::2]), likeness), {})[tuple(map(int, pieces[1::2]))] = item
    # All groups of one family of names stay together, where the family begins.
    begins: dict[tuple[str, ...], tuple[int, ...]] = {}
    for (name_parts, _), members in families.items():
        begins[name_parts] = min([begins[name_parts], *members] if name_parts in begins else members)
    groups = []
    for (name_parts, _), members in families.items():
        for grid in _grids(sorted(members)):
            axes = [*map(_spelled, grid), ""]
            name = "".join(safe(w) + a for w, a in zip(name_parts, axes, strict=True))
            order = (name_parts[0], begins[name_parts][:1], name_parts[1:], tuple(axis[0] for axis in grid))
            groups.append((order, Group(name, tuple(members[place] for place in product(*grid)))))
    return [group for _, group in sorted(groups, key=itemgetter(0))]


def _grids(places: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Split sorted places into full grids: one tuple of sorted numbers per axis."""
    if not places[0]:
        return [()]
    tails: dict[int, list[tuple[int, ...]]] = {}
    for first, *others in places:
        tails.setdefault(first, []).append(tuple(others))
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rests in tails.items():
        alike.setdefault(tuple(rests), []).append(first)
    return [(tuple(firsts), *grid) for rests, firsts in alike.items() for grid in _grids(rests)]


def _spelled(numbers: Sequence[int]) -> str:
    """`3`, `{0,1}`, `{0-31}`, `{0-3,7,10-30 step 5}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    pieces = []
    start = 0
    while start < len(numbers):
        stop = start + 1
        step = numbers[stop] - numbers[start] if stop < len(numbers) else 1
        while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        if stop - start >= (_SHORTEST_RUN if step == 1 else _SHORTEST_STEPPED_RUN):
            pieces.append(f"{numbers[start]}-{numbers[stop - 1]}" + (f" step {step}" if step > 1 else ""))
        else:
            stop = start + 1
            pieces.append(str(numbers[start]))
        start = stop
    return "{" + ",".join(pieces) + "}"
