"""A folder has shards that do not belong to what its index or its other shards name.

Files of an earlier run that were not removed. Programs that read every file with a fitting name take the old values.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "remove the files of the earlier run"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "index-stale-shards")
