"""Rules whose defect a reader refuses: the reader names the rule, so that what is refused is stated once."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject


def refused(subject: Subject, id: str) -> Iterator[Observation]:
    """The reader's own words, where it has refused the subject for the defect of this rule."""
    error = subject.error
    if error is not None and error.defect == id:
        yield Observation(error.message, error.details, error.hint)
