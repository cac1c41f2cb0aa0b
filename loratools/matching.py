"""Which weight of a base each name of an adapter means; every leftover named.

An adapter names modules as its trainer's model did, a checkpoint as it was saved: the two may differ by a prefix
(`model.`, `bert.`, `transformer.`). One renaming is looked for that explains all names, by names and shapes together.
Where two explain equally many, or none explains all, that is an error with names in it, never a guess.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from loratools.adapter import Adapter
from loratools.errors import MismatchError
from loratools.naming.language.aliases import aliases
from loratools.naming.language.conv1d import is_conv1d, is_known
from loratools.naming.language.experts import stored_in_out
from loratools.naming.language.split import aliases_by_rows
from loratools.naming.places import Alias, Part, Place
from loratools.naming.renaming import Renaming, Shapes, best_renamings
from loratools.updates.parts.protocol import Update, flow

_MISSING = "no such weight in the base"


@dataclass(frozen=True)
class Leftover:
    """A name of the adapter that found no place, why, and the names of the base that come nearest."""

    name: str
    why: str
    nearest: tuple[str, ...] = ()

    @property
    def is_missing(self) -> bool:
        """Whether the base has no weight of this name, and not one of another size."""
        return self.why == _MISSING

    @property
    def described(self) -> str:
        """Why, and the nearest names."""
        return self.why + (f"; nearest: {', '.join(self.nearest)}" if self.nearest else "")

    def __str__(self) -> str:
        return f"{self.name}   {self.described}"


@dataclass(frozen=True)
class Matches:
    """Where the names of an adapter go.

    updates       target -> the places that it means: one, or several where the base has in pieces what is one weight
                  to the adapter
    replacements  replaced name -> the places of the base that it takes, each a whole tensor
    added         replaced names that the base has no weight for (a new head) -> the name to store them under
    """

    updates: Mapping[str, tuple[Place, ...]]
    replacements: Mapping[str, tuple[Place, ...]]
    added: Mapping[str, str]
    leftovers: tuple[Leftover, ...]
    renaming: Renaming = field(default_factory=Renaming)
    warnings: tuple[str, ...] = ()


def spellings(target: str) -> tuple[str, ...]:
    """The weights that a target may mean: its module's, the joint one of an attention, or a parameter of that name."""
    return f"{target}.weight", f"{target}.in_proj_weight", target


def match(adapter: Adapter, shapes: Shapes, *, config: Mapping[str, object] | None = None) -> Matches:
    """Find the place of every name of `adapter` among the weights of a base (name -> shape; tied names included).

    config: The config of the base, which determines names in memory and layers stored as (in, out).

    Raises:
        MismatchError: Two renamings explain the names equally well, or two names mean the same weight.
    """
    config = config or {}
    alias_of, sizes, renaming = _names_of_base(adapter, shapes, config)
    orientation = _Orientation(adapter, config)
    # An update of a weight that the adapter replaces itself (a resized head) is one of the replacement.
    replaced_shapes = {renaming(name): r.tensor.shape for name, r in adapter.replacements.items() if r.rows is None}
    updates: dict[str, tuple[Place, ...]] = {}
    missing: list[tuple[str, str]] = []

    for target, update in adapter.updates.items():
        known_names = [name for name in map(renaming, spellings(target)) if name in alias_of]
        fitting = [name for name in known_names if orientation.possible(update, replaced_shapes.get(name, sizes[name]))]
        if not known_names:
            if not update.optional:
                missing.append((target, _MISSING))
        elif fitting and not orientation.decidable(update, replaced_shapes.get(fitting[0], sizes[fitting[0]])):
            missing.append((target, "square experts, and nothing says how they are stored: see --expert-orientation"))
        elif not fitting:
            missing.append(
                (
                    target,
                    f"adapter {_size(update)}, base {flow(replaced_shapes.get(known_names[0], sizes[known_names[0]]))}",
                )
            )
        else:
            name = fitting[0]
            transposed = orientation.decided(target, update, replaced_shapes.get(name, sizes[name]))
            places = tuple(p for place in alias_of[name].places for p in _oriented(place, update, transposed))
            if update.needs_base and any(p.of.rows or p.of.columns for p in places):
                missing.append((target, f"{update.kind} depends on a whole weight, which the base stores in pieces"))
            else:
                updates[target] = places

    replacements, added = _replacements(adapter, alias_of, renaming, missing)
    _refuse_shared_place(updates, replacements)
    # Looking for near names is slow in a large base, and three show what is the matter.
    leftovers = [
        Leftover(name, why, _nearest(renaming(name), sizes) if i < 3 and why == _MISSING else ())
        for i, (name, why) in enumerate(missing)
    ]
    warnings = orientation.warnings(updates)
    return Matches(updates, replacements, added, tuple(leftovers), renaming, tuple(warnings))


class _Aliases(Mapping[str, Alias]):
    """Every name of a weight of a base. Of a stored one the alias is itself, and is made when it is asked for: an
    adapter may be of a few of the 45,000 weights of a model of experts."""

    def __init__(self, shapes: Shapes, named: Mapping[str, Alias]) -> None:
        self._shapes, self._named = shapes, named

    def __getitem__(self, name: str) -> Alias:
        alias = self._named.get(name)
        return alias if alias is not None else Alias(self._shapes[name], (Place(name),))

    def __contains__(self, name: object) -> bool:
        return name in self._shapes or name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter({**self._named, **self._shapes})

    def __len__(self) -> int:
        return len({**self._named, **self._shapes})


def _names_of_base(
    adapter: Adapter, shapes: Shapes, config: Mapping[str, object]
) -> tuple[_Aliases, dict[str, tuple[int, ...]], Renaming]:
    """The names that the weights of the base go by, the shape of each, and how the names of the adapter lead to them.

    The other names of experts are looked for where some name of the adapter leads to nothing without them.
    """
    wanted = _Wanted.of(adapter)
    by_rows = aliases_by_rows(_rows_by_end(adapter), shapes)

    def names(experts: bool) -> tuple[_Aliases, dict[str, tuple[int, ...]]]:
        by_name = aliases(config, shapes, experts=experts)
        sizes = {name: alias.shape for name, alias in by_rows.items()} | dict(shapes)
        sizes |= {name: alias.shape for name, alias in by_name.items()}
        return _Aliases(shapes, by_rows | by_name), sizes

    alias_of, sizes = names(experts=False)
    if all(name in alias_of for name in adapter.replacements) and wanted.is_named_as(sizes):
        return alias_of, sizes, Renaming()
    alias_of, sizes = names(experts=True)
    return alias_of, sizes, _best_renaming(adapter, wanted, sizes, alias_of)


def _rows_by_end(adapter: Adapter) -> dict[str, int]:
    """The rows of each module by the last two parts of its name, where all modules of that name have as many."""
    rows: dict[str, set[int | None]] = {}
    for target, update in adapter.updates.items():
        rows.setdefault(".".join(target.split(".")[-2:]), set()).add(update.shape[0] if update.shape else None)
    return {end: size for end, sizes in rows.items() if len(sizes) == 1 and (size := next(iter(sizes))) is not None}


def _size(update: Update) -> str:
    """What an update says of the weight it fits; its parts, where it says nothing."""
    if any(size is not None for size in update.shape):
        return flow(update.shape)
    parts = (f"{part} {'x'.join(map(str, tensor.shape)) or '()'}" for part, tensor in update.parts.items())
    return f"{update.kind} with {', '.join(parts)}"


def _oriented(place: Place, update: Update, transposed: bool) -> list[Place]:
    """The place of an update whose weight is the alias's, or its transpose; one for each expert of fused ones."""
    if transposed:
        assert place.order is None, "what has heads in another order has their rows first"
        place = replace(place, transposed=not place.transposed, of=place.of.transposed())
    experts = update.as_experts()
    if experts is None or place.of.expert is not None:
        return [place]
    return [
        replace(place, at=replace(place.at, expert=i), of=replace(place.of, expert=i)) for i in range(experts.experts)
    ]


def _replacements(
    adapter: Adapter, alias_of: Mapping[str, Alias], renaming: Renaming, missing: list[tuple[str, str]]
) -> tuple[dict[str, tuple[Place, ...]], dict[str, str]]:
    """Where replaced weights go, and those that the base has no weight for; what does not fit is put in `missing`."""
    replacements: dict[str, tuple[Place, ...]] = {}
    added: dict[str, str] = {}
    modules = {name.rpartition(".")[0] for name in alias_of} if adapter.replacements else set()
    for name, replacement in adapter.replacements.items():
        base_name = next((n for n in (renaming(name), name) if n in alias_of), None)
        if base_name is not None:
            places, shape = alias_of[base_name].places, alias_of[base_name].shape
            pieces = any(not place.is_whole for place in places)
            if pieces and replacement.rows is None and replacement.tensor.shape != shape:
                # Pieces of another size would be cut out of it, and what is left dropped.
                missing.append((name, f"adapter {flow(replacement.tensor.shape)}, base {flow(shape)}"))
            elif replacement.rows is not None and (pieces or places[0].transposed):
                missing.append((name, f"some rows of what the base stores otherwise, in {places[0].weight}"))
            elif all(place.at == Part() for place in places):
                replacements[name] = places
            else:
                missing.append((name, f"the base stores it as a part of {places[0].weight}"))
        elif replacement.declared == "modules_to_save" and not _inside(name, modules, renaming):
            added[name] = name
        else:
            missing.append((name, _MISSING))
    return replacements, added


class _Orientation:
    """Whether a weight is stored as (out, in) or (in, out): by its shape, and by name or flag where that is square."""

    def __init__(self, adapter: Adapter, config: Mapping[str, object]) -> None:
        self.adapter = adapter
        model_type = config.get("model_type")
        self.model_type = model_type if isinstance(model_type, str) else None
        self.flag = adapter.fan_in_fan_out
        self.undecided: set[str] = set()

    def possible(self, update: Update, shape: tuple[int, ...]) -> bool:
        return update.fits(shape) or self._fits_transposed(update, shape)

    def decidable(self, update: Update, shape: tuple[int, ...]) -> bool:
        experts = update.as_experts()
        if experts is None or experts.orientation is not None:
            return True
        return not (update.fits(shape) and self._fits_transposed(update, shape))

    def decided(self, target: str, update: Update, shape: tuple[int, ...]) -> bool:
        """Whether the weight is the transpose of what the layer computes with."""
        straight, transposed = update.fits(shape), self._fits_transposed(update, shape)
        if not (straight and transposed):
            return transposed
        self.undecided.add(target)
        if (experts := update.as_experts()) is not None:
            by_class = stored_in_out(self.model_type)
            return {"in-out": True, "out-in": False, "module": by_class, "inverted": not by_class}[
                experts.orientation or "module"
            ]
        if len(shape) != 2 or update.embedding:
            return False
        # PEFT ignores the flag for layers whose class it knows.
        return is_conv1d(self.model_type, target) if self.flag is None or is_known(self.model_type) else self.flag

    @staticmethod
    def _fits_transposed(update: Update, shape: tuple[int, ...]) -> bool:
        """Whether it is one of the transpose; the axes of a kernel are never exchanged."""
        matrix = len(shape) == 2 or (len(shape) == 3 and update.as_experts() is not None)
        return matrix and update.fits(_swapped(shape))

    def warnings(self, updates: Mapping[str, tuple[Place, ...]]) -> list[str]:
        """The flag decides for square weights only; where the others all contradict it, say so."""
        square = [t for t in updates if t in self.undecided]
        decided = {places[0].transposed for t, places in updates.items() if t not in self.undecided and places}
        if square and self.flag is not None and decided == {not self.flag}:
            stored = "(in, out)" if self.flag else "(out, in)"
            return [
                f"fan_in_fan_out={self.flag} makes {len(square)} square weights {stored}; "
                "all others are stored the other way"
            ]
        return []


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last two axes of a matrix, or of one for each expert, the other way round."""
    return (*shape[:-2], *shape[:-3:-1])


def _inside(name: str, modules: set[str], renaming: Renaming) -> bool:
    """Whether the module that `name` belongs to exists in the base, so that `name` is a misfit and no new head."""
    parent = name.rpartition(".")[0]
    return parent in modules or renaming(parent) in modules


@dataclass(frozen=True)
class _Wanted:
    """What of an adapter is looked for in a base: its updates; of one that only replaces weights, those.

    Attributes:
        values: What is looked for, by name: an update, or the shape of a replaced weight.
        orientation: Whether an update may be one of a weight of some shape.
    """

    values: Mapping[str, Update | tuple[int, ...]]
    orientation: _Orientation

    @classmethod
    def of(cls, adapter: Adapter) -> _Wanted:
        replaced_shapes = {name: r.tensor.shape for name, r in adapter.replacements.items()}
        return cls(dict(adapter.updates) or replaced_shapes, _Orientation(adapter, {}))

    def spelled(self, name: str) -> tuple[str, ...]:
        """The weights that a name may mean."""
        return (name,) if isinstance(self.values[name], tuple) else spellings(name)

    def same(self, value: Update | tuple[int, ...], weight: tuple[int, ...]) -> bool:
        """Whether what is looked for may be a weight of this shape."""
        if isinstance(value, tuple):
            return weight in (value, value[::-1])
        return self.orientation.possible(value, weight)

    def is_named_as(self, shapes: Shapes) -> bool:
        """Whether all of it is among these weights under the very names that it has."""
        return all(
            any(spelling in shapes and self.same(value, shapes[spelling]) for spelling in self.spelled(name))
            for name, value in self.values.items()
        )


def _best_renaming(adapter: Adapter, wanted: _Wanted, shapes: Shapes, alias_of: Mapping[str, Alias]) -> Renaming:
    names = wanted.values
    winners, count = best_renamings(names, shapes, wanted.same, spelled=wanted.spelled)
    if len(winners) > 1:
        # One leads to a weight by the name that it is stored under, another by its name in memory.
        leading = {
            tuple(alias_of.get(w(s)) for name in names for s in wanted.spelled(name)): w for w in reversed(winners)
        }
        winners = list(leading.values())[::-1]
    if len(winners) > 1:
        first = next(iter(names))
        raise MismatchError(
            f"the names of '{adapter.name}' fit the base in {len(winners)} ways, {count} of {len(names)} each",
            details=[f"with {winner}: {winner(first)}" for winner in winners],
            hint="rename the adapter's keys, or choose its part with --include",
        )
    return winners[0]


def _nearest(name: str, shapes: Shapes) -> tuple[str, ...]:
    """The names of the base that look most like `name`, of those that it shares a word with: a module's own name."""
    parts = {part for part in name.split(".")[-2:] if part not in ("weight", "bias")}
    pool = [n for n in shapes if parts & set(n.split("."))]
    return tuple(difflib.get_close_matches(f"{name}.weight", pool[:5000], n=2, cutoff=0.5))


def _refuse_shared_place(
    updates: Mapping[str, tuple[Place, ...]], replacements: Mapping[str, tuple[Place, ...]]
) -> None:
    counts = [Counter(str(place) for places in each.values() for place in places) for each in (updates, replacements)]
    twice = sorted({weight for c in counts for weight, count in c.items() if count > 1})
    if twice:
        raise MismatchError(
            f"{len(twice)} weights of the base are named by the adapter more than once",
            details=twice,
            hint="choose one with --include or --exclude",
        )
