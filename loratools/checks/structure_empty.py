"""Weights are stored without values.

They were saved while their values lay on other devices (DeepSpeed ZeRO-3, FSDP), so that only their names are left.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "save the adapter again, with its parameters gathered"


def observe(subject: Subject) -> Iterator[Observation]:
    """Replaced weights with no elements."""
    if subject.adapter is None:
        return
    replaced = subject.adapter.replacements.items()
    names = tuple(name for name, replacement in replaced if not replacement.tensor.elements)
    if names:
        yield Observation(f"{counted_names(names, 'weight')} without values", names)
