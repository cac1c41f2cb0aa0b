"""Families of models: the names of their modules, read in both directions, and what tells them from other models.

A rule says what a module is called in the model's first publication ("original": LDM, BFL, Wan, ...) and what in
diffusers, whose names are the ones used here. A module that was published fused (qkv) has several names in diffusers.

    Rule("double_blocks.{}.img_attn.qkv", ("transformer_blocks.{}.attn.to_q", ...to_k, ...to_v), split="thirds")

`{}` stands for any number, so that tables hold for larger and smaller models of the family. A name whose dots have
become underscores (kohya) is looked up in the same tables, never taken apart by rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

# A number that stands alone between separators: `img_mlp.0`, not the one of `linear1`.
_NUMBER = {".": re.compile(r"(?<![^.{}])\d+(?![^.])"), "_": re.compile(r"(?<![^_])\d+(?![^_])")}
# Names of which the meaning is kept: those of the largest files, for a few families.
_CACHED_NAMES = 1 << 15
_SLOT = {".": re.compile(r"(?<![^.])(\d+|\{\})(?![^.])"), "_": re.compile(r"(?<![^_])(\d+|\{\})(?![^_])")}


# A tuple, as there are thousands, made at each start; a frozen dataclass takes several times as long to make.
class Rule(NamedTuple):
    """One module of the original model and the modules that it is in diffusers.

    split   how its outputs are shared out over several: see `sizes`
    swap    where it has two outputs for each input, the halves stand in the other order (scale, shift) in diffusers
    gated   the halves stand in the other order in diffusers, whatever the number of inputs (a gate and what it gates)
    ratio   outputs for each input, where this tells families of the same names apart
    """

    original: str
    diffusers: tuple[str, ...]
    split: str = ""
    swap: bool = False
    ratio: float | None = None
    gated: bool = False


@dataclass(frozen=True)
class Place:
    """What one name means: the modules of diffusers, and how the outputs are shared out over them.

    `name`: the same with dots, as the model was published or as diffusers has it.
    """

    name: str = field(compare=False)
    targets: tuple[str, ...]
    split: str = ""
    swap: bool = False
    gated: bool = False

    @property
    def may_swap(self) -> bool:
        """Whether its halves stand in the other order in diffusers, for some numbers of inputs or for all."""
        return self.swap or self.gated

    def halves_swapped(self, rows: int, columns: int) -> bool:
        """Whether the halves of a module with these numbers of outputs and inputs are in the other order in
        diffusers.
        """
        return rows % 2 == 0 and (self.gated or (self.swap and rows == 2 * columns))


@dataclass(frozen=True)
class Fused:
    """Where a module of diffusers lies in the original model: it is the `part`-th of `place.targets`."""

    place: Place
    part: int

    @property
    def name(self) -> str:
        return self.place.name


@dataclass(frozen=True, eq=False)
class Family:
    """Models with the same module names.

    Names alone do not tell a family (`evidence.py`). What else a family states:

    component      what diffusers calls this part of a pipeline: unet or transformer
    rules          by spelling: `original`, and others where later tools have spelled the same module otherwise
    fused          modules that diffusers itself has in place of several, once it is asked to fuse them
    kohya          which names kohya's trainers flatten: `original` or `diffusers`
    depths         first part of diffusers' names -> numbers of such blocks that published models have
    widths         end of diffusers' names -> numbers of inputs that such modules have in published models
    exclusive      starts of names, in any spelling, that no model of another family has, but for those with a table
                   that knows them as well; `{}` stands for a number
    classes        of diffusers, as a config.json has them in `_class_name`
    words          in headers of files and names of base models, lower case, with `-` for any other sign
    text_encoders  how many the pipeline has, where that excludes files with more
    second         whether a pipeline has two transformers, one for much noise and one for little
    """

    name: str
    component: str
    rules: Mapping[str, tuple[Rule, ...]]
    kohya: str = "original"
    fused: tuple[Rule, ...] = ()
    depths: Mapping[str, frozenset[int]] = field(default_factory=dict)
    widths: Mapping[str, frozenset[int]] = field(default_factory=dict)
    exclusive: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    text_encoders: int | None = None
    second: bool = False

    def find(self, name: str, *, flat: bool = False) -> Place | None:
        """What `name` means, in any spelling of the family; `flat` with underscores for its dots."""
        return self._find(name, flat)

    # Deciding on a family asks for the meaning of every name several times, and files of a kind have the same names.
    @lru_cache(maxsize=_CACHED_NAMES)  # noqa: B019 (families are as old as the program)
    def _find(self, name: str, flat: bool) -> Place | None:
        rule_and_numbers = self._look_up(name, flat)
        return None if rule_and_numbers is None else _place(*rule_and_numbers)

    @lru_cache(maxsize=_CACHED_NAMES)  # noqa: B019
    def _look_up(self, name: str, flat: bool) -> tuple[Rule, tuple[str, ...]] | None:
        template, numbers = _template(name, "_" if flat else ".")
        # Asked before the tables are made: a name begins as those of a few families do, which alone need theirs.
        if template.partition("{}")[0] not in (self._flat_starts if flat else self._starts):
            return None
        for slots, rule, _ in (self._flat if flat else self._dotted).get(template, ()):
            if all(slot in ("{}", n) for slot, n in zip(slots, numbers, strict=True)):
                return rule, tuple(n for slot, n in zip(slots, numbers, strict=True) if slot == "{}")
        return None

    def ratio(self, name: str, *, flat: bool = False) -> float | None:
        """How many outputs for each input a module of this family has, where the table says so."""
        rule_and_numbers = self._look_up(name, flat)
        return None if rule_and_numbers is None else rule_and_numbers[0].ratio

    def inputs(self, name: str, *, flat: bool = False) -> frozenset[int]:
        """How many inputs a module has in published models of this family; empty if the table does not say."""
        place = self.find(name, flat=flat)
        return frozenset() if place is None else self._inputs_of(_template(place.targets[0], ".")[0])

    @lru_cache(maxsize=_CACHED_NAMES)  # noqa: B019
    def _inputs_of(self, template: str) -> frozenset[int]:
        dotted = f".{template}"
        return next((sizes for end, sizes in self._inputs.items() if dotted.endswith(end)), frozenset())

    def is_exclusive(self, name: str, *, flat: bool = False) -> bool:
        """Whether no model of another family has a module of this name."""
        return _template(name, "_" if flat else ".")[0].startswith(self._exclusive[flat])

    @cached_property
    def _inputs(self) -> dict[str, frozenset[int]]:
        return {"." + _NUMBER["."].sub("{}", end): sizes for end, sizes in self.widths.items()}

    @cached_property
    def _exclusive(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        templates = tuple(_NUMBER["."].sub("{}", start) for start in self.exclusive)
        return templates, tuple(start.replace(".", "_") for start in templates)

    def fused_back(self, target: str) -> Fused | None:
        """Where a module of diffusers lies in one that diffusers itself fuses; None if it does not."""
        return self._looked_up(target, "fused")

    def back(self, target: str, spelling: str) -> Fused | None:
        """Where a module of diffusers lies in the model as `spelling` names it; None if it does not."""
        if spelling == "diffusers":
            place = self.find(target)
            return None if place is None or place.targets != (target,) else Fused(place, 0)
        return self._looked_up(target, spelling if spelling in self.rules else "original")

    def _looked_up(self, target: str, spelling: str) -> Fused | None:
        template, numbers = _template(target, ".")
        for slots, rule, part in self._back[spelling].get(template, ()):
            if all(slot in ("{}", n) for slot, n in zip(slots, numbers, strict=True)):
                free = tuple(n for slot, n in zip(slots, numbers, strict=True) if slot == "{}")
                return Fused(_place(rule, free), part)
        return None

    @cached_property
    def _named(self) -> list[tuple[str, Rule]]:
        """Every template by which a module may be named; diffusers' own names mean themselves.

        What several modules are fused into has one name, the published one, however it is spelled.
        """
        published = {rule.diffusers: rule for rule in self.rules.get("original", ()) if len(rule.diffusers) > 1}
        diffusers_rules = {
            t: Rule(t, (t,), ratio=ratio)
            for rules in self.rules.values()
            for rule in rules
            for t, ratio in zip(rule.diffusers, _ratios(rule), strict=True)
        }
        spelled = [(rule.original, rule) for rules in (*self.rules.values(), self.fused) for rule in rules]
        return [(template, published.get(rule.diffusers, rule)) for template, rule in spelled] + list(
            diffusers_rules.items()
        )

    @cached_property
    def _starts(self) -> frozenset[str]:
        """How names of modules begin, up to their first number."""
        return frozenset(_SLOT["."].split(text, 1)[0] for text in self._texts)

    @cached_property
    def _flat_starts(self) -> frozenset[str]:
        """The same of names with underscores for their dots."""
        return frozenset(_SLOT["_"].split(text.replace(".", "_"), 1)[0] for text in self._texts)

    @property
    def _texts(self) -> set[str]:
        """What stands before the first `{}` of every template: far fewer texts than templates."""
        rules = [rule for rules in (*self.rules.values(), self.fused) for rule in rules]
        templates = [rule.original for rule in rules] + [t for rule in rules for t in rule.diffusers]
        return {f"{start}{slot}" for start, slot, _ in (template.partition("{}") for template in templates)}

    @cached_property
    def _dotted(self) -> _Table:
        return _table((template, rule, 0) for template, rule in self._named)

    @cached_property
    def _flat(self) -> _Table:
        return _table(((template.replace(".", "_"), rule, 0) for template, rule in self._named), "_")

    @cached_property
    def _back(self) -> dict[str, _Table]:
        return {
            spelling: _table((t, rule, part) for rule in rules for part, t in enumerate(rule.diffusers))
            for spelling, rules in (*self.rules.items(), ("fused", self.fused))
        }


@lru_cache(maxsize=_CACHED_NAMES)
def _template(name: str, separator: str) -> tuple[str, tuple[str, ...]]:
    """The name with `{}` for every number, and the numbers."""
    number = _NUMBER[separator]
    return number.sub("{}", name), tuple(number.findall(name))


def _place(rule: Rule, numbers: Sequence[str]) -> Place:
    targets = tuple(target.format(*numbers) for target in rule.diffusers)
    return Place(rule.original.format(*numbers), targets, rule.split, rule.swap, rule.gated)


# template with every number as {} -> what stands at these places (a number or {}), rule, which of its modules
_Table = dict[str, list[tuple[tuple[str, ...], Rule, int]]]


def _table(entries: Iterable[tuple[str, Rule, int]], separator: str = ".") -> _Table:
    table: _Table = {}
    split = _SLOT[separator].split
    for template, rule, part in entries:
        # Texts between the slots, and the slots, in turn.
        pieces = split(template)
        table.setdefault("{}".join(pieces[::2]), []).append((tuple(pieces[1::2]), rule, part))
    return table


def same(*templates: str, ratio: float | None = None) -> tuple[Rule, ...]:
    """Modules that are called the same in both."""
    return tuple(Rule(t, (t,), ratio=ratio) for t in templates)


def _ratios(rule: Rule) -> tuple[float | None, ...]:
    """Outputs for each input of the parts of a module: see `sizes`."""
    count = len(rule.diffusers)
    if rule.ratio is None or count == 1:
        return (rule.ratio,) * count
    if rule.split == "thirds":
        return (rule.ratio / count,) * count
    if rule.split == "hidden":
        return (1, 1, 1, rule.ratio - 3)
    return (1, (rule.ratio - 1) / 2, (rule.ratio - 1) / 2)


def sizes(split: str, rows: int, columns: int, count: int) -> tuple[int, ...] | None:
    """How many of the `rows` outputs of a fused module each of its `count` modules gets; None if it cannot be.

    thirds   all the same
    hidden   three as wide as the input (q, k, v), and the rest
    grouped  the first as wide as the input (q), the others share the rest (k and v of fewer heads)
    """
    if split == "thirds":
        return (rows // count,) * count if rows % count == 0 else None
    if split == "hidden":
        remaining = rows - 3 * columns
        return (columns, columns, columns, remaining) if remaining > 0 else None
    remaining = rows - columns
    return (columns, remaining // 2, remaining // 2) if remaining > 0 and remaining % 2 == 0 else None
