"""The config and the tensors disagree over DoRA.

Where the config asks for magnitudes that are not stored, programs make them from the base; where magnitudes are stored
and the config does not ask for them, programs leave them out. Neither is the model that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.refused import refused
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "set use_dora in adapter_config.json as the training had it"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader refused the file for."""
    yield from refused(subject, "config-dora")
