"""The initialisation of the training changed the base.

PiSSA, OLoRA, CorDA and LoRA-GA take a part out of the base when the training begins. Added to the plain base, the
factors count that part twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "headers"
FIX = "merge with --initial, or convert the adapter to plain LoRA with PEFT"


def observe(subject: Subject) -> Iterator[Observation]:
    """The initialisation, as the config names it."""
    if subject.adapter is not None and (name := subject.adapter.initialisation_changed_base) is not None:
        yield Observation(f"init_lora_weights is '{name}'", (name,))
