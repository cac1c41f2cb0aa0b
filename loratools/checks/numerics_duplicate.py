"""Another adapter of the same run makes the same change.

The updates are equal up to rounding, whatever names, formats, scales and dtypes they are stored in: a copy, or one
state of a training under two names.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted
from loratools.storage.origins import shown

SEVERITY = "warning"
NEEDS = "others"
FIX = "keep one of them; 'loratools list FOLDER --duplicates --values' lists the groups"


def observe(subject: Subject) -> Iterator[Observation]:
    """The other adapters."""
    if subject.twins:
        paths = tuple(shown(path) for path in subject.twins)
        yield Observation(f"the same update is in {counted(len(paths), 'other adapter')}", paths)
