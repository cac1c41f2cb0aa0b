"""The rules of `check`: one file is one rule, and the file's name is the rule's id.

An id begins with its family: `container-truncated` is of the family `container`. The first line of a rule's docstring
is its summary, the rest says why it matters. Each file has

    SEVERITY   `error`, `warning` or `note`
    FIX        what to do about it, where a single observation says nothing else
    NEEDS      what has to be read or given: `headers`, `values`, `base`, `program` or `others`
    observe    from a `Subject` to the `Observation`s of the rule, and an `Unobserved` for what it could not look at
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol, TypeAlias, cast

from loratools import registry
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject
from loratools.errors import UsageError

Severity: TypeAlias = Literal["error", "warning", "note"]
Needs: TypeAlias = Literal["headers", "values", "base", "program", "others"]

# In the order in which findings are listed: what keeps a file from being read comes first.
FAMILIES = (
    "container",
    "pickle",
    "paths",
    "index",
    "config",
    "keys",
    "shapes",
    "structure",
    "numerics",
    "provenance",
    "server",
)


class Rule(Protocol):
    """A file of this folder."""

    SEVERITY: Severity
    FIX: str
    NEEDS: Needs
    observe: Callable[[Subject], Iterable[Observation | Unobserved]]


def ids() -> tuple[str, ...]:
    """The ids of all rules, by family."""
    return tuple(sorted(registry.names("checks"), key=lambda id: (FAMILIES.index(family_of(id)), id)))


def family_of(id: str) -> str:
    """The family of a rule."""
    return id.partition("-")[0]


def rule(id: str) -> Rule:
    """The rule of this id.

    Raises:
        UsageError: There is none; the nearest ids are named.
    """
    if id not in registry.names("checks"):
        raise _unknown(id, ids())
    return cast(Rule, registry.load("checks", id))


def selected(select: Sequence[str], ignore: Sequence[str]) -> tuple[str, ...]:
    """The ids of the rules that are wanted: those of `select`, or all, without those of `ignore`.

    Args:
        select: Ids and families.
        ignore: Ids and families.

    Raises:
        UsageError: There is no such id or family.
    """
    wanted = set(_expanded(select)) if select else set(ids())
    left_out = set(_expanded(ignore))
    return tuple(id for id in ids() if id in wanted and id not in left_out)


def _expanded(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        rules = [id for id in ids() if name in (id, family_of(id))]
        if not rules:
            raise _unknown(name, (*FAMILIES, *ids()))
        yield from rules


def _unknown(name: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return UsageError(
        f"no rule named '{name}'",
        details=near,
        hint=f"did you mean '{near[0]}'?" if near else f"families of rules are {', '.join(FAMILIES)}",
    )
