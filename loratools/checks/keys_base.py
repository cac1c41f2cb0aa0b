"""Names of the adapter mean nothing in the base.

The adapter is for another model, or for another way of writing its names. Programs that skip what they do not find run
the base with a part of the adapter, or with none.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.errors import LoraToolsError

SEVERITY = "error"
NEEDS = "base"
FIX = "give the base that the adapter was trained on, or convert the adapter to its names with --base"


def observe(subject: Subject) -> Iterator[Observation]:
    """Names without a place, and the nearest names; or why none of them has one."""
    fit = subject.fit
    if isinstance(fit, LoraToolsError):
        yield Observation(fit.message, fit.details, fit.hint)
    elif fit is not None:
        missing = [leftover for leftover in fit.leftovers if leftover.is_missing]
        if missing:
            names = counted_names([leftover.name for leftover in missing], "name")
            yield Observation(f"the base has no weight for {names}", tuple(map(str, missing)))
