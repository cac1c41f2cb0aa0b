"""The adapter changes or replaces the head of the model.

A new head belongs to a task, and only programs that build the model for this task load it. A changed language head
decides about every token, and is not loaded by most servers.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.heads import is_head
from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "headers"
FIX = "load it with the task that it was trained for"


def observe(subject: Subject) -> Iterator[Observation]:
    """Updates and replaced weights of heads."""
    if subject.adapter is None:
        return
    names = tuple(filter(is_head, [*subject.adapter.updates, *subject.adapter.replacements]))
    if names:
        yield Observation(f"the adapter changes {counted_names(names, 'part')} of a head", names)
