"""A header or a config has a key twice.

One program reads the first value and another the last, so that two programs see two adapters.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again with the program that trained it; do not trust the source of this file"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-duplicate-key")
