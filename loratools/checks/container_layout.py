"""Tensors of a file overlap, or bytes of it belong to none.

Bytes that no tensor has can hide anything, and tensors that share bytes cannot both be what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again with a current version of safetensors; do not trust the source of this file"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-layout")
