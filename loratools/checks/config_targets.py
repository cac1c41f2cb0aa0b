"""Modules have factors, and the config does not name them.

PEFT makes factors for the modules that target_modules names, and leaves tensors of others out without a word.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.module_lists import is_listed
from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "headers"
FIX = "add the modules to target_modules in adapter_config.json"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """Modules that no entry of target_modules is the end of."""
    listed = subject.config.get("target_modules")
    if subject.adapter is not None and isinstance(listed, str):
        yield Unobserved("target_modules is a text that PEFT expands, and no list of names")
    # Parameters of experts are named in a field of their own, by their own rules.
    if subject.adapter is None or not isinstance(listed, list) or subject.config.get("target_parameters"):
        return
    entries = frozenset(str(entry) for entry in listed)
    names = tuple(name for name in subject.adapter.updates if not is_listed(name, entries))
    if names:
        yield Observation(f"target_modules does not name {counted_names(names, 'module')}", names)
