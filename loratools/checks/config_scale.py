"""The scale of the adapter is negative, or far from those that people train with.

Mostly an alpha that was divided twice or not at all, or rsLoRA whose alpha was meant for plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "headers"
FIX = "look up lora_alpha and use_rslora of the training, and correct adapter_config.json"

_LARGEST = 128.0


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules whose scale is below 0 or above a hundred."""
    if subject.adapter is None:
        return
    scales = {n: u.scale for n, u in subject.adapter.updates.items() if u.as_lora() is not None}
    names = tuple(name for name, scale in scales.items() if scale < 0 or scale > _LARGEST)
    if names:
        yield Observation(f"the scale of {counted_names(names, 'module')} is {scales[names[0]]:g}", names)
