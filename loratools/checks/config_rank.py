"""The config says another rank than the tensors have.

The scale is alpha divided by the rank. Where the two ranks differ, it is not known which of them the training divided
by, and programs disagree.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "correct r or rank_pattern in adapter_config.json to the rank that the training had"


def observe(subject: Subject) -> Iterator[Observation]:
    """What PEFT's reader is not certain of, which is only this."""
    adapter = subject.adapter
    if adapter is not None and adapter.format == "peft" and adapter.uncertainties:
        yield Observation("config and tensors say different ranks", adapter.uncertainties)
