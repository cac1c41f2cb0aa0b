"""A pickle names code that is not known to be harmless.

Loading a pickle runs what it names. Nothing of it was run here, and nothing should be anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "do not load the file; ask for the weights as safetensors"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "pickle-code")
