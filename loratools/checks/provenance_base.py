"""The adapter records another base than the one that was given.

Models of one family have equal names and sizes, so that an adapter fits the wrong one of them as well, and makes
something of it that nobody trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.naming.same_model import other_model
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "base"
FIX = "give the recorded base, or correct base_model_name_or_path if this is the same model under another name"


def observe(subject: Subject) -> Iterator[Observation]:
    """Both names, where the base says itself that it is another model; what its folder is called is no evidence."""
    if subject.adapter is None or subject.base is None or subject.base.path is None:
        return
    recorded = subject.adapter.base_model
    other = other_model(recorded, subject.base.path, subject.base.config) if recorded else None
    if recorded and other is not None:
        base = quoted(subject.base.path)
        yield Observation(
            f"the base is recorded as {quoted(recorded)}, and {base} says that it is {quoted(other)}", (recorded, other)
        )
