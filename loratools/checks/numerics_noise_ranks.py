"""Most of the rank of a module is rounding noise.

Of its directions, fewer than half are larger than what rounding the stored factors can have made. The others take space
and time, and do nothing. Filling up to one common rank does the same on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.measured import without_factors
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "note"
NEEDS = "values"
FIX = "resize it without loss: loratools resize ADAPTER -o OUT --error 0.001"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """Modules with fewer numbers above the noise than half of their rank."""
    yield from without_factors(subject.modules)
    noisy = tuple(
        f"{name}: {module.numerical_rank} of {module.rank}"
        for name, module in (subject.modules or {}).items()
        if module.norm and module.rank and module.numerical_rank is not None
        # 2 of a rank of 3 are not few.
        if 2 * module.numerical_rank < module.rank
    )
    if noisy:
        yield Observation(f"most of the rank is noise in {counted(len(noisy), 'module')}", noisy)
