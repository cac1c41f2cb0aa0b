"""Updates of the adapter do not have the sizes of the base.

The names are those of the base, and the weights are not: another size of the same family of models, or another
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.errors import LoraToolsError

SEVERITY = "error"
NEEDS = "base"
FIX = "give the base that the adapter was trained on"


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules with a weight of another size, and both sizes."""
    fit = subject.fit
    if fit is None or isinstance(fit, LoraToolsError):
        return
    misfits = [leftover for leftover in fit.leftovers if not leftover.is_missing]
    if misfits:
        names = counted_names([leftover.name for leftover in misfits], "update")
        yield Observation(f"the base's weights have other sizes than {names}", tuple(map(str, misfits)))
