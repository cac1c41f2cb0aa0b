"""Keys of rank_pattern or alpha_pattern match no module.

They were meant for a module that is not there, or are spelled so that they do not match, and the module has the rank
and alpha of all others.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "headers"
FIX = "correct or remove the keys in adapter_config.json"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader says of keys that it could not use."""
    if subject.adapter is None:
        return
    for warning in subject.adapter.warnings:
        if warning.startswith(("rank_pattern:", "alpha_pattern:")):
            yield Observation(warning)
