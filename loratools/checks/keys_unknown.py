"""Tensors of the adapter are not read by its format.

Each may be a part of the training. Programs that skip unknown keys would load less than what was trained, without a
word.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "look whether the adapter was saved by another program than its names say, or leave them out: --exclude GLOB"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "keys-unknown")
