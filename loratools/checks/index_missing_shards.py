"""Shards of an adapter or a model are missing.

A model or an adapter that is stored in several files is only complete with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "download the missing files"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "index-missing-shards")
