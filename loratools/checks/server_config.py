"""The config lacks fields that the server cannot do without.

Servers take rank, alpha and the names of modules from the config before they look at a tensor, and refuse an adapter
whose config does not say them.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.servers import SERVERS
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "program"
FIX = "write the adapter for the server: loratools convert ADAPTER -o OUT --to peft --serve SERVER"

_NEEDED = ("r", "lora_alpha", "target_modules")


def observe(subject: Subject) -> Iterator[Observation]:
    """The fields that are absent or empty."""
    if subject.program not in SERVERS or subject.adapter is None or subject.adapter.format != "peft":
        return
    absent = tuple(name for name in _NEEDED if not subject.config.get(name))
    if absent:
        yield Observation(f"{subject.program} needs {counted_names(absent, 'field')} of adapter_config.json", absent)
