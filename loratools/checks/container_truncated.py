"""A file ends before its last tensor does.

A download or a copy that was cut off, or a disk that was full. What is missing is a part of the training; programs that
map files into memory may crash on it, or read zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "download or copy the file again, and compare its size and SHA-256 with the source's"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-truncated")
