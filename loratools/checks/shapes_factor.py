"""A tensor cannot be the factor that its name says.

It has no axes, no rows or columns, whole numbers, or as many numbers as nothing in its module has. Shards that were not
gathered when a model was saved (DeepSpeed ZeRO-3, FSDP) leave such tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again, with its parameters gathered"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "shapes-factor")
