"""Files beside the adapter hold tensors that are not read.

They may be a part of the training that some program saves apart: a projector, a head, embeddings of new tokens. Without
them the adapter is not what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "headers"
FIX = "find out which program wrote the files; move them away if they do not belong to the adapter"


def observe(subject: Subject) -> Iterator[Observation]:
    """The files."""
    if subject.adapter is not None and (names := subject.adapter.unread_companions):
        yield Observation(f"{counted_names(names, 'file')} beside the adapter, not read here", names)
