"""Nothing that is stored says the alpha of the adapter.

It is then taken to be the rank, so that the scale is 1: a convention of programs for images, and not a fact. An adapter
that was trained with another alpha is too weak or too strong by a constant factor.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "headers"
FIX = "compare the strength with what the training showed; convert with --alpha ALPHA stores the right one"


def observe(subject: Subject) -> Iterator[Observation]:
    """The modules of which the alpha is assumed."""
    if subject.adapter is None:
        return
    names = tuple(
        name
        for name, update in subject.adapter.updates.items()
        if update.alpha_source == "assumed" and update.as_lora() is not None and update.alpha != 0
    )
    if names:
        yield Observation(f"the alpha of {counted_names(names, 'module')} is assumed", names)
