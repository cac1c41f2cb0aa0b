"""Something cannot be read as an adapter or a model, for a reason that no other rule is about.

What cannot be read here is not known to be what was trained, whatever other programs make of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "do what the message says; 'loratools formats' lists the formats that are read"


def observe(subject: Subject) -> Iterator[Observation]:
    """The reader's own words, where no other rule has explained them."""
    error = subject.error
    if error is not None and not subject.explained:
        yield Observation(error.message, error.details, error.hint)
