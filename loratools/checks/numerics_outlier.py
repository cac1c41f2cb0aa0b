"""The update of a module is far larger than those of all others.

Compared by the root mean square of the change of a weight, beside the median over all modules and how far modules
usually are from it. Such a module dominates what the adapter does: a training that diverged there, a scale that was
applied twice, or a file that was tampered with.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.measured import without_factors
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.robust import far_above
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "values"
FIX = "look at the modules: loratools inspect ADAPTER --modules --values"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """Modules that stand out, each with how many times the median it is."""
    yield from without_factors(subject.modules)
    sizes = {
        name: module.norm / module.size**0.5
        for name, module in (subject.modules or {}).items()
        if module.norm and module.size
    }
    if outliers := far_above(sizes):
        lines = tuple(f"{name}: {ratio:,.0f} times the median" for name, ratio in outliers.items())
        yield Observation(f"the update of {counted(len(lines), 'module')} is far larger than the others", lines)
