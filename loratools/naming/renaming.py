"""One prefix for all names: two trees of module names that are the same but for where they hang.

A trainer's model may have a `model.`, `bert.` or `transformer.` around what a checkpoint stores without it. Looked for
is the renaming that brings most names onto names of the same shape; a few names propose, all decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Shapes = Mapping[str, tuple[int, ...]]
Stored = TypeVar("Stored")


@dataclass(frozen=True)
class Renaming:
    """Take `strip` off the front of a name, if it is there, and put `add` before it."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.strip)

    def __bool__(self) -> bool:
        return bool(self.strip or self.add)

    def __str__(self) -> str:
        if self.strip and self.add:
            return f"'{self.strip}' read as '{self.add}'"
        return f"'{self.strip}' taken off" if self.strip else f"'{self.add}' put before"


def best_renamings(
    stored: Mapping[str, Stored],
    base_shapes: Shapes,
    same: Callable[[Stored, tuple[int, ...]], bool],
    *,
    spelled: Callable[[str], Sequence[str]] = lambda name: (name,),
) -> tuple[list[Renaming], int]:
    """Those that bring most wanted names onto names that are there, with the same shape; and how many they bring.

    spelled: the names that one wanted name may stand for, such as a module's for its weight's.

    No renaming at all wins every tie. Where nothing fits, a single renaming that explains all names, whatever their
    shapes, is returned: another size of the same model is better told by its shapes.
    """

    names = {name: tuple(spelled(name)) for name in stored}

    def fits(renaming: Renaming) -> int:
        def has_place(name: str, value: Stored) -> bool:
            candidates = (base_shapes.get(renaming(spelling)) for spelling in names[name])
            return any(base_shape is not None and same(value, base_shape) for base_shape in candidates)

        return sum(1 for name, value in stored.items() if has_place(name, value))

    identity = Renaming()
    if (count := fits(identity)) == len(stored):
        return [identity], count
    scores = {candidate: fits(candidate) for candidate in {identity, *_candidates(names, base_shapes)}}
    best = max(scores.values())
    if best == 0:
        named = [c for c in scores if all(any(c(s) in base_shapes for s in spellings) for spellings in names.values())]
        return (named if len(named) == 1 else [identity]), 0
    if scores[identity] == best:
        return [identity], best
    return sorted((c for c, score in scores.items() if score == best), key=lambda c: (c.strip, c.add)), best


def _candidates(spellings: Mapping[str, Sequence[str]], base_names: Iterable[str]) -> set[Renaming]:
    """Every renaming that brings one of a few wanted names onto a name that is there."""
    by_leaf: dict[str, list[list[str]]] = {}
    for name in base_names:
        segments = name.split(".")
        by_leaf.setdefault(_leaf(segments), []).append(segments)
    renamings: set[Renaming] = set()
    names = sorted(spellings)
    chosen = names[:: max(1, len(names) // 16)]
    for segments in [spelling.split(".") for name in chosen for spelling in spellings[name]]:
        for base_segments in by_leaf.get(_leaf(segments), ()):
            common = _common_tail(segments, base_segments)
            strip, add = segments[:-common], base_segments[:-common]
            # The tail must reach past the layer number, or every layer would look like every other.
            if not any(part.isdigit() for part in [*strip, *add]):
                renamings.add(Renaming("".join(f"{s}." for s in strip), "".join(f"{s}." for s in add)))
    return renamings


def _leaf(segments: list[str]) -> str:
    return ".".join(segments[-2:])


def _common_tail(a: list[str], b: list[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
