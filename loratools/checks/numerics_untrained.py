"""Some modules have factors that change nothing.

Modules that no gradient reaches stay as they began: the part of a model that a training does not use, or one that was
frozen by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.measured import without_factors
from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject

SEVERITY = "note"
NEEDS = "values"
FIX = "leave the modules out: loratools convert ADAPTER -o OUT --to FORMAT --exclude GLOB"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """Modules whose update is exactly 0, beside others that are not."""
    yield from without_factors(subject.modules)
    modules = subject.modules or {}
    names = tuple(name for name, module in modules.items() if module.norm == 0)
    if names and len(names) < len(modules):
        yield Observation(f"the update is 0 in {counted_names(names, 'module')}, and not in the others", names)
