"""A module has one of its two factors.

An update is the product of both. With one missing there is nothing to apply, and programs that make up the other one
load a module that was not trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.pairs import factor_pairs
from loratools.checks.common.subject import Subject
from loratools.hints import DAMAGED_ADAPTER

SEVERITY = "error"
NEEDS = "headers"
FIX = DAMAGED_ADAPTER


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules whose A or B is alone."""
    if subject.source is None:
        return
    unpaired = tuple(
        key for parts in factor_pairs(subject.source.tensors).values() if len(parts) == 1 for key, _ in parts.values()
    )
    if unpaired:
        yield Observation(f"{counted_names(unpaired, 'factor')} whose counterpart is missing", unpaired)
