"""Which weight of a base each name of an adapter means; every leftover named.

An adapter names modules as its trainer's model did, a checkpoint as it was saved: the two may differ by a prefix
(`model.`, `bert.`, `transformer.`). One renaming is looked for that explains all names, by names and shapes together.
Where two explain equally many, or none explains all, that is an error with names in it, never a guess.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools.adapter import Adapter
from loratools.errors import MismatchError
from loratools.naming.conv1d import is_conv1d
from loratools.naming.renaming import Renaming, Shapes, best_renamings
from loratools.naming.vision import in_memory

_MISSING = "no such weight in the base"


@dataclass(frozen=True)
class Place:
    """What a target turns out to mean: a weight of the base, `transposed` where it is stored as (in, out)."""

    weight: str
    transposed: bool = False


@dataclass(frozen=True)
class Leftover:
    """A name of the adapter that found no place, why, and the names of the base that come nearest."""

    name: str
    why: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}   {self.why}" + (f"; nearest: {', '.join(self.nearest)}" if self.nearest else "")


@dataclass(frozen=True)
class Matches:
    """`updates`: target -> place; `replacements`: replaced name -> weight of the base; `added`: replaced names that
    the base has no weight for (a new head) -> the name to store them under."""

    updates: Mapping[str, Place]
    replacements: Mapping[str, str]
    added: Mapping[str, str]
    leftovers: tuple[Leftover, ...]
    renaming: Renaming = field(default_factory=Renaming)
    warnings: tuple[str, ...] = ()


def match(adapter: Adapter, shapes: Shapes, *, model_type: str | None = None) -> Matches:
    """Find the place of every name of `adapter` among the weights of a base (name -> shape; tied names included).

    Raises:
        MismatchError: two renamings explain the names equally well, or two names mean the same weight.
    """
    stored = in_memory(model_type, shapes)
    shapes = {**{name: shapes[where] for name, where in stored.items()}, **shapes}
    renaming = _best_renaming(adapter, shapes)
    flag = _fan_in_fan_out(adapter)
    updates: dict[str, Place] = {}
    replacements: dict[str, str] = {}
    added: dict[str, str] = {}
    missing: list[tuple[str, str]] = []

    # An update of a weight that the adapter replaces itself (a resized head) is one of the replacement.
    own = {renaming(name): r.tensor.shape for name, r in adapter.replacements.items()}
    for target, update in adapter.updates.items():
        weight = renaming(target) + ".weight"
        if weight not in shapes:
            missing.append((target, _MISSING))
            continue
        there = own.get(weight, shapes[weight])
        straight, turned = there == update.shape, there == update.shape[::-1]
        if straight and turned:
            transposed = is_conv1d(model_type, target) if flag is None else flag
            updates[target] = Place(stored.get(weight, weight), transposed)
        elif straight or turned:
            updates[target] = Place(stored.get(weight, weight), transposed=turned)
        else:
            missing.append((target, f"adapter {_flow(update.shape)}, base {_flow(there)}"))

    modules = {name.rpartition(".")[0] for name in shapes}
    for name, replacement in adapter.replacements.items():
        found = next((n for n in (renaming(name), name) if n in shapes), None)
        if found is not None:
            replacements[name] = stored.get(found, found)
        elif replacement.declared == "modules_to_save" and not _inside(name, modules, renaming):
            added[name] = name
        else:
            missing.append((name, _MISSING))

    _refuse_meant_twice(updates, replacements)
    # Looking for near names is slow in a large base, and three show what is the matter.
    leftovers = [
        Leftover(name, why, _nearest(renaming(name), shapes) if i < 3 and why == _MISSING else ())
        for i, (name, why) in enumerate(missing)
    ]
    warnings = _orientation_warnings(updates, adapter, flag)
    return Matches(updates, replacements, added, tuple(leftovers), renaming, tuple(warnings))


def _flow(shape: tuple[int, ...]) -> str:
    """`(out, in)` as people read a layer: in -> out."""
    return f"{shape[1]} -> {shape[0]}" if len(shape) == 2 else "x".join(map(str, shape)) or "a scalar"


def _inside(name: str, modules: set[str], renaming: Renaming) -> bool:
    """Whether the module that `name` belongs to exists in the base, so that `name` is a misfit and no new head."""
    parent = name.rpartition(".")[0]
    return parent in modules or renaming(parent) in modules


def _fan_in_fan_out(adapter: Adapter) -> bool | None:
    """What the adapter says of how square weights are stored; None where it does not say."""
    notes = adapter.notes.get("peft")
    config = notes.get("config") if isinstance(notes, Mapping) else None
    flag = config.get("fan_in_fan_out") if isinstance(config, Mapping) else None
    return flag if isinstance(flag, bool) else None


def _best_renaming(adapter: Adapter, shapes: Shapes) -> Renaming:
    wanted = {f"{target}.weight": update.shape for target, update in adapter.updates.items()}
    if not wanted:  # an adapter of replaced weights only
        wanted = {name: r.tensor.shape for name, r in adapter.replacements.items()}
    winners, count = best_renamings(wanted, shapes, lambda update, weight: weight in (update, update[::-1]))
    if len(winners) > 1:
        first = next(iter(wanted))
        raise MismatchError(
            f"the names of '{adapter.name}' fit the base in {len(winners)} ways, {count} of {len(wanted)} each",
            details=[f"with {winner}: {winner(first)}" for winner in winners],
            hint="rename the adapter's keys, or choose its part with --include",
        )
    return winners[0]


def _nearest(name: str, shapes: Shapes) -> tuple[str, ...]:
    """The names of the base that look most like `name`, of those that it shares a word with: a module's own name."""
    words = {part for part in name.split(".")[-2:] if part not in ("weight", "bias")}
    pool = [n for n in shapes if words & set(n.split("."))]
    return tuple(difflib.get_close_matches(f"{name}.weight", pool[:5000], n=2, cutoff=0.5))


def _orientation_warnings(updates: Mapping[str, Place], adapter: Adapter, flag: bool | None) -> list[str]:
    """The flag decides for square weights only; where the others all contradict it, say so."""
    square = [t for t in updates if len(set(adapter.updates[t].shape)) == 1]
    others = {updates[t].transposed for t in updates if t not in square}
    if square and flag is not None and others == {not flag}:
        stored = "(in, out)" if flag else "(out, in)"
        return [
            f"fan_in_fan_out={flag} makes {len(square)} square weights {stored}; all others are stored the other way"
        ]
    return []


def _refuse_meant_twice(updates: Mapping[str, Place], replacements: Mapping[str, str]) -> None:
    counts = [Counter(p.weight for p in updates.values()), Counter(replacements.values())]
    twice = sorted({weight for c in counts for weight, count in c.items() if count > 1})
    if twice:
        raise MismatchError(
            f"{len(twice)} weights of the base are meant by more than one name of the adapter",
            details=twice,
            hint="choose one with --include or --exclude",
        )
