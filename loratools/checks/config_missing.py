"""The weights of PEFT have no config beside them.

Rank can be read off the tensors; alpha, rsLoRA and the base cannot. Programs that load the adapter refuse it, or apply
it with the scale of their defaults.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import ADAPTER_FILES, CONFIG, WEIGHTS
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "put adapter_config.json of the training beside the weights"


def observe(subject: Subject) -> Iterator[Observation]:
    """A file of weights under PEFT's own name without a config."""
    source = subject.source
    if source is None or source.config is not None:
        return
    # Beside a file of any other name nobody expects a config.
    if source.file.name in ADAPTER_FILES and source.file.name in WEIGHTS:
        yield Observation(f"{quoted(source.file.name)} has no {CONFIG} beside it", (CONFIG,))
