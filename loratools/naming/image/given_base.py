"""What names mean where a person has named the base, and whether an adapter can be of that base at all.

A base answers what names leave open, and is refused where the adapter contradicts it: by names that its family does not
have, and by sizes. Those of a model are its own: outputs and inputs of attention and feed-forward layers, and how many
blocks there are. Where only the family is known, sizes are those of published models. There may be others, so that they
count only where another family fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loratools.errors import MismatchError
from loratools.naming.image.evidence import (
    Decision,
    Sizes,
    block_numbers,
    described,
    families_in,
    has_other_ratios,
    is_too_deep,
    listed,
    shortened,
    width_vote,
)
from loratools.naming.image.family import Family, Place
from loratools.storage.files import quoted


@dataclass(frozen=True)
class GivenBase:
    """A base that a person has named.

    Attributes:
        family: Its family.
        modules: Outputs and inputs of each module of the part that removes the noise, by the base's own names; empty if
            only the family is known.
    """

    family: Family
    modules: Sizes = field(default_factory=dict)


def decide_for(
    base: GivenBase, names: Sizes, families: Iterable[Family], *, flat: bool = False, header: str | None = None
) -> Decision:
    """What the names mean in the family of a given base.

    Args:
        base: The base.
        names: Outputs and inputs of every module of the adapter, by name.
        families: The families that the file can be of.
        flat: Whether underscores stand for the dots of the names.
        header: What the file says of the model it is for.

    Raises:
        MismatchError: The adapter is of another family, or for another model of this one.
    """
    family, families = base.family, tuple(families)
    places = {name: place for name in names if (place := family.find(name, flat=flat)) is not None}
    unknown = list(names) if family not in families else [name for name in names if name not in places]
    fitting = [f for f in families if f is not family and _fits(names, f, flat, header)]
    if unknown:
        raise _mismatch(base, fitting or _possible(names, families, flat), shortened(unknown), len(unknown))
    published = not has_other_ratios(names, family, flat) and not is_too_deep(names, family, flat)
    as_published = published and width_vote(names, family, flat) >= 0
    if differences := _differences(names, places, base):
        raise _mismatch(base, [] if as_published else fitting, differences, 0)
    if not base.modules and not as_published and fitting:
        raise _mismatch(base, fitting, [described(names)], 0)
    return Decision((family,), places)


def _fits(names: Sizes, family: Family, flat: bool, header: str | None) -> bool:
    """Whether sizes or the header speak for a family that has all names, and nothing against it."""
    if any(family.find(name, flat=flat) is None for name in names):
        return False
    if has_other_ratios(names, family, flat) or is_too_deep(names, family, flat):
        return False
    vote = width_vote(names, family, flat)
    return vote > 0 or (vote == 0 and family in families_in(header, [family]))


def _possible(names: Sizes, families: Sequence[Family], flat: bool) -> list[Family]:
    """The families that have all names, without those that other ratios or more blocks rule out where some are left."""
    knowing = [family for family in families if all(family.find(name, flat=flat) is not None for name in names)]
    likely = [f for f in knowing if not has_other_ratios(names, f, flat) and not is_too_deep(names, f, flat)]
    return likely or knowing


def _differences(names: Sizes, places: Mapping[str, Place], base: GivenBase) -> list[str]:
    """Modules of the adapter that the base has in another size or behind its last block, in words."""
    of_base: dict[str, tuple[tuple[str, ...], tuple[int | None, int | None]]] = {}
    for name, sizes in base.modules.items():
        place = base.family.find(name)
        of_base |= {} if place is None else dict.fromkeys(place.targets, (place.targets, sizes))
    depths = {block: max(numbers) for block, numbers in block_numbers(base.modules, base.family, False).items()}
    texts = []
    for name, (rows, columns) in names.items():
        target = places[name].targets[0]
        block, _, within = target.partition(".")
        number = within.partition(".")[0]
        if block in depths and number.isdecimal() and int(number) > depths[block]:
            texts.append(f"{quoted(name)}: the base has {depths[block] + 1} of these blocks")
            continue
        # Layers outside of the blocks are larger in some adapters (control), and those that the table has widths of.
        if target not in of_base or not base.family.inputs(target):
            continue
        targets, (base_rows, base_columns) = of_base[target]
        if columns is not None and base_columns is not None and columns != base_columns:
            texts.append(f"{quoted(name)} has {columns} inputs, and the base {base_columns}")
        elif targets == places[name].targets and rows is not None and base_rows is not None and rows != base_rows:
            texts.append(f"{quoted(name)} has {rows} outputs, and the base {base_rows}")
    return texts[:5] + ([f"… and {len(texts) - 5} more"] if len(texts) > 5 else [])


def _mismatch(base: GivenBase, others: Sequence[Family], details: Sequence[str], unknown: int) -> MismatchError:
    family = base.family.name
    others = [other for other in others if other is not base.family]
    if others:
        message = f"the adapter is of {listed(others, 'or')}, and the given base is of {family}"
    elif unknown:
        message = f"{unknown} names are of no module of {family}, the family of the given base"
    else:
        message = f"the adapter is of another model than the given base, which is of {family} too"
    return MismatchError(message, details=details, hint="give the model that the adapter was trained on")
