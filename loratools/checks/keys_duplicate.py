"""A weight is stored more than once, with different values or under several names.

Which of the values was trained is not known, and programs take one or the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again, from the model without the wrappers of its training"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "keys-duplicate")
