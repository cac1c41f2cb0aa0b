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
FIX = (
    "find out which program saved the tensors; to go on without them: "
    "loratools convert ADAPTER -o OUT --to FORMAT --exclude GLOB"
)


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    # What the reader says to do is for verbs that leave tensors out.
    yield from (each._replace(fix=None) for each in refused(subject, "keys-unknown"))
