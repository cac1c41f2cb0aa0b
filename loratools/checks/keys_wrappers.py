"""Names of tensors have wrappers of a training in them.

torch.compile, FSDP and others put a module around modules, whose name is then in the keys. It is taken out here; other
programs find no module of these names.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "write the names anew: loratools convert ADAPTER -o OUT --to peft"


def observe(subject: Subject) -> Iterator[Observation]:
    """The tools whose wrappers are there."""
    if subject.source is not None and subject.source.wrappers:
        tools = tuple(f"{tool}: {counted(n, 'tensor')}" for tool, n in sorted(subject.source.wrappers.items()))
        yield Observation(f"names have wrappers of {', '.join(sorted(subject.source.wrappers))}", tools)
