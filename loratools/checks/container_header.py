"""A file has no header that can be read.

A safetensors file begins with the length of its header and a JSON object. What begins otherwise is damaged, or no file
of tensors at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "download the file again, or save the adapter again"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "container-header")
