"""A config has fields that change the result and are not understood.

An unknown peft_type or field may mean any change of the mathematics; ignoring it would be a guess.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "remove the field where it is harmless, or convert the adapter to plain LoRA with the program that trained it"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "config-not-read")
