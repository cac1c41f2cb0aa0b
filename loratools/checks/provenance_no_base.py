"""The adapter does not say which base it was trained on.

Whoever finds it has to guess, and names and sizes of one family of models are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "headers"
FIX = "put the name of the model into base_model_name_or_path of adapter_config.json"


def observe(subject: Subject) -> Iterator[Observation]:
    """An adapter of PEFT whose config names no base; other formats have no field for it."""
    adapter = subject.adapter
    if adapter is not None and adapter.format == "peft" and subject.config and not adapter.base_model:
        yield Observation("base_model_name_or_path is empty")
