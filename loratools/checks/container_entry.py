"""A header describes a tensor that cannot be.

Its bytes do not have the size that shape and dtype need, or dtype, shape or name are none. Readers disagree over such
files, and some read beyond the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again with a current version of safetensors"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-entry")
