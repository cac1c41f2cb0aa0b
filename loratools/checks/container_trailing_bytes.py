"""A file goes on after its last tensor.

What follows is read by no program that reads the tensors: a second file, a payload, or the rest of an older and longer
file that was overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again, or cut the file where its last tensor ends"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-trailing-bytes")
