"""Which family of models names are of: decided by names, shapes, widths, depth and the header together.

A family that knows all names is a candidate, no more. What speaks about a candidate:

    excluded     a block behind the last of any published model, or another ratio of outputs to inputs
    header       words of the file's header, or of the name of a base model
    widths       as many inputs as published models have, or as none of them has
    depth        all blocks are there, and as many as a published model has
    exclusive    names that no other model has
    ratio        outputs for each input, as the table has them

What is decided needs one candidate, or several in which all names mean the same, and a word in favour of it. All else
is a question, which a given base answers (`given_base.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from loratools import registry
from loratools.errors import UndecidedError, UnsupportedError
from loratools.naming.image.family import Family, Place
from loratools.storage.files import quoted

# (outputs, inputs) of a module; None if the file does not tell.
Sizes = Mapping[str, tuple[int | None, int | None]]
_HINT = "name the model it is for: --base BASE"
# Outputs for each input that attention and feed-forward layers of any transformer have, which prove nothing.
_USUAL_RATIOS = (1, 2, 3, 4, 1 / 2, 1 / 3, 1 / 4)
# Decisions on more names are not kept.
_MOST_NAMES = 8192
_SEPARATORS = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Decision:
    """The families that names may belong to, and what the names mean there.

    `families`: the one that the names are of, or several in which they mean the same. `places`: what they mean.
    """

    families: tuple[Family, ...]
    places: Mapping[str, Place]

    @property
    def family(self) -> Family | None:
        """The one family; None if there are several."""
        return self.families[0] if len(self.families) == 1 else None


@cache
def denoisers() -> tuple[Family, ...]:
    """Every family of UNets and transformers."""
    folder = "naming/image/families"
    return tuple(_family(folder, name) for name in registry.names(folder))


def family_named(name: str) -> Family | None:
    """The family of this name, as `loratools.family` has it in headers."""
    return next((family for family in denoisers() if family.name == name), None)


def decide(
    names: Sizes,
    families: Iterable[Family],
    *,
    flat: bool = False,
    header: str | None = None,
    same: Callable[[Family, Family], bool] | None = None,
) -> Decision:
    """What the names mean, and in which family.

    Args:
        names: Outputs and inputs of every module, by name.
        families: candidates.
        flat: Whether underscores stand for the dots of the names.
        header: What the file says of the model it is for.
        same: Whether two families agree on the names; all names mean the same modules of diffusers, if None.

    Raises:
        UnsupportedError: No family knows all names.
        UndecidedError: Several do, with different meanings; or only names speak for the one that does.
    """
    if same is not None or len(names) > _MOST_NAMES:
        return _decided(names, tuple(families), flat, header, same)
    return _decided_once(tuple(names.items()), tuple(families), flat, header)


# Of thousands of adapters for one model nearly all change the same modules.
@lru_cache(maxsize=64)
def _decided_once(
    names: tuple[tuple[str, tuple[int | None, int | None]], ...],
    families: tuple[Family, ...],
    flat: bool,
    header: str | None,
) -> Decision:
    return _decided(dict(names), families, flat, header, None)


def _decided(
    names: Sizes,
    families: tuple[Family, ...],
    flat: bool,
    header: str | None,
    same: Callable[[Family, Family], bool] | None,
) -> Decision:
    def meanings(family: Family) -> dict[str, Place]:
        return {name: place for name in names if (place := family.find(name, flat=flat)) is not None}

    # Most families are ruled out by one of the first names.
    knowing = [family for family in families if all(family.find(name, flat=flat) is not None for name in names)]
    if not knowing:
        raise _unknown(names, {family: meanings(family) for family in families})
    # Names that no other model has outweigh shapes and depth: it is another size of that model.
    certain = [family for family in knowing if any(family.is_exclusive(name, flat=flat) for name in names)]
    shaped = [family for family in knowing if not has_other_ratios(names, family, flat)]
    possible = [family for family in shaped if not is_too_deep(names, family, flat)] or certain
    if not possible:
        raise _contradicted(knowing, "its shapes or the numbers of its blocks", names)
    named = families_in(header, denoisers())
    if named and not any(family in possible for family in named) and any(family in knowing for family in named):
        raise _contradicted(named, "its shapes or the numbers of its blocks", names)
    candidates = [family for family in possible if family in named] or possible
    proven = bool(certain) or len(shaped) < len(knowing) or any(family in named for family in candidates)
    for speaks in (width_vote, _depth):
        votes = {family: speaks(names, family, flat) for family in candidates}
        best = max(votes.values())
        # What speaks against all of them speaks against none: it is another size of one of them.
        candidates = [family for family in candidates if votes[family] == best]
        proven = proven or best > 0
    agree = same or (lambda one, other: meanings(one) == meanings(other))
    if not all(agree(candidates[0], other) for other in candidates[1:]):
        first = meanings(candidates[0])
        differing = [n for n in names if any(other.find(n, flat=flat) != first[n] for other in candidates)]
        raise UndecidedError(
            f"it may be of {listed(candidates, 'or')}: {len(differing)} of {len(names)} names mean different "
            "modules in them"
            if differing
            else f"it may be of {listed(candidates, 'or')}, which call its modules differently",
            details=[quoted(name) for name in differing[:5]],
            hint=_HINT,
        )
    if not proven and len(candidates) == 1 and not _has_distinct_ratio(names, candidates[0], flat):
        raise _contradicted(candidates, "nothing but its names", names)
    return Decision(tuple(candidates), meanings(candidates[0]))


def families_in(text: str | None, families: Sequence[Family]) -> list[Family]:
    """Families that a text speaks of: those with its longest word; none where it speaks of none."""
    normalised = f"-{_SEPARATORS.sub('-', (text or '').lower())}"
    exact = [family for family in families if family.name == (text or "").lower()]
    if exact:
        return exact
    lengths = {f: max((len(word) for word in f.words if f"-{word}" in normalised), default=0) for f in families}
    longest = max(lengths.values(), default=0)
    return [family for family, length in lengths.items() if length == longest > 0]


def _family(folder: str, name: str) -> Family:
    from importlib import import_module

    family: Family = import_module(f"loratools.{folder.replace('/', '.')}.{name.replace('-', '_')}").FAMILY
    return family


def has_other_ratios(names: Sizes, family: Family, flat: bool) -> bool:
    """Whether a module has another number of outputs for each input than in this family."""
    for name, (rows, columns) in names.items():
        if rows is None or columns is None:
            continue
        # A third of a step is more than any rounding, and less than what tells two families apart.
        ratio = family.ratio(name, flat=flat)
        if ratio is not None and not 0.9 < rows / columns / ratio < 1.1:
            return True
    return False


def is_too_deep(names: Sizes, family: Family, flat: bool) -> bool:
    """Whether there is a block behind the last of every published model."""
    numbers = block_numbers(names, family, flat)
    return any(max(numbers[block]) >= max(depths) for block, depths in family.depths.items() if block in numbers)


def width_vote(names: Sizes, family: Family, flat: bool) -> int:
    """What the widths say: 1 where all inputs are those of a published model, -1 where some are not, else 0."""
    are_published = [
        columns in sizes
        for name, (_, columns) in names.items()
        if columns is not None and (sizes := family.inputs(name, flat=flat))
    ]
    return 0 if not are_published else 1 if all(are_published) else -1


def _depth(names: Sizes, family: Family, flat: bool) -> int:
    """1 where there are as many blocks as in a published model, -1 where there are not, 0 where some are missing."""
    all_numbers = block_numbers(names, family, flat)
    numbers = {block: indices for block, indices in all_numbers.items() if block in family.depths}
    ends = {block: max(indices) + 1 in family.depths[block] for block, indices in numbers.items()}
    at_end = [ends[block] for block, indices in numbers.items() if len(indices) == max(indices) + 1]
    if at_end:
        return 1 if all(at_end) else -1
    # The last of a few chosen blocks may be that of a model by chance, but not of two kinds of blocks.
    return 1 if len(ends) > 1 and all(ends.values()) else 0


def block_numbers(names: Iterable[str], family: Family, flat: bool) -> dict[str, set[int]]:
    """First part of diffusers' names -> the numbers of such blocks that there are."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        place = family.find(name, flat=flat)
        block, _, within = (place.targets[0] if place is not None else "").partition(".")
        number = within.partition(".")[0]
        if number.isdecimal():
            numbers.setdefault(block, set()).add(int(number))
    return numbers


def _has_distinct_ratio(names: Sizes, family: Family, flat: bool) -> bool:
    """Whether a module has a shape that few models have."""
    ratios = [
        ratio
        for name, (rows, columns) in names.items()
        if rows is not None and columns is not None and (ratio := family.ratio(name, flat=flat)) is not None
    ]
    return any(all(abs(ratio - usual) > 0.01 for usual in _USUAL_RATIOS) for ratio in ratios)


def _contradicted(families: Sequence[Family], why: str, names: Sizes) -> UndecidedError:
    if why.startswith("nothing"):
        message = f"{why} speak for {listed(families, 'or')}, which is no proof"
    else:
        message = f"its names are of {listed(families, 'or')}, and {why} are not"
    return UndecidedError(message, details=[described(names)], hint=_HINT)


def described(names: Sizes) -> str:
    """The first name, how many there are, and the numbers of inputs, for a message."""
    widths = sorted({columns for _, columns in names.values() if columns is not None})
    return f"{quoted(next(iter(names)))}, {len(names)} modules, inputs of {', '.join(map(str, widths[:5]))}"


def _unknown(names: Sizes, places: Mapping[Family, Mapping[str, Place]]) -> UnsupportedError:
    best = max(places, key=lambda family: len(places[family]))
    missing = [name for name in names if name not in places[best]]
    if len(names) == 1:
        message = "its one module name is not known in any model here"
    elif len(missing) == len(names):
        message = f"none of its {len(names)} module names is known in any model here"
    else:
        share = f"{len(missing)} of its {len(names)} module names"
        message = f"{share} {'is' if len(missing) == 1 else 'are'} not known in {best.name}, nor all in any other"
    return UnsupportedError(message, details=shortened(missing), hint=_HINT)


def shortened(names: Sequence[str]) -> list[str]:
    """The first names in quotes, and how many more there are."""
    more = [f"… and {len(names) - 5} more"] if len(names) > 5 else []
    return [quoted(name) for name in names[:5]] + more


def listed(families: Iterable[Family], conjunction: str) -> str:
    """Names of families in one text: `flux or flux2`."""
    return f" {conjunction} ".join(family.name for family in families)
