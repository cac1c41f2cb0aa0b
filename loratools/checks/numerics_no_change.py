"""The adapter changes nothing.

Every update is exactly 0, as it is before the first step of a training: it was saved too early, its learning rate was
0, or another file was meant.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.measured import without_factors
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "values"
FIX = "use the state after the training; if this is it, train again with a learning rate above 0"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """The adapter, where no update and no replaced weight changes anything."""
    yield from without_factors(subject.modules)
    modules = subject.modules
    if subject.adapter is None or not modules or subject.adapter.replacements:
        return
    if all(module.norm == 0 for module in modules.values()):
        yield Observation(
            f"the adapter changes nothing: every update is 0 ({counted(len(modules), 'module')})", tuple(modules)
        )
