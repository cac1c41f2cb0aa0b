"""The adapter replaces whole weights of the base.

They take the place of the base's values, whatever model they are loaded into, and are not scaled with the adapter. Most
servers do not load them.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.heads import is_head
from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "headers"
FIX = "merge the adapter into the base that it was trained on, where a program does not load them"


def observe(subject: Subject) -> Iterator[Observation]:
    """Replaced weights that are no heads and no rows of tokens, about which other rules speak."""
    if subject.adapter is None:
        return
    replaced = subject.adapter.replacements.items()
    names = tuple(name for name, replacement in replaced if replacement.rows is None and not is_head(name))
    if names:
        yield Observation(f"the adapter replaces {counted_names(names, 'whole weight')}", names)
