"""A config or an index is no JSON that every program reads in the same way.

Damaged, too large, not in UTF-8, nested too deeply, or with numbers that JSON does not have.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "write the file again with the program that trained the adapter"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-json")
