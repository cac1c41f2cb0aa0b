"""The config names modules that have no factors.

Either the list is longer than the model, which changes nothing; or tensors of these modules were lost when the adapter
was saved.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.module_lists import ends_of
from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "headers"
FIX = "remove the entries from target_modules, or save the adapter again if these modules were trained"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """Entries of target_modules that are the end of no module's name."""
    listed = subject.config.get("target_modules")
    if subject.adapter is not None and isinstance(listed, str):
        yield Unobserved("target_modules is a text that PEFT expands, and no list of names")
    if subject.adapter is None or not isinstance(listed, list):
        return
    ends = {end for name in subject.adapter.updates for end in ends_of(name)}
    unused = tuple(sorted(str(entry) for entry in listed if str(entry) not in ends))
    if unused:
        yield Observation(f"target_modules names {counted_names(unused, 'module')} without factors", unused)
