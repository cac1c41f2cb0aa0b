"""A model names files outside of its own folder.

An index or a link that leads elsewhere has other files of the machine read and copied into results.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "do not trust the model; copy the files that are meant into the folder"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "paths-outside")
