"""A config has values that its fields cannot have.

A rank of 0, an alpha that is no number: programs fail on them, or fall back on defaults without a word.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "correct the values; ranks are the sizes of the tensors"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "config-values")
