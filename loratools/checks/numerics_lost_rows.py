"""Most rows of a factor B are zeros.

A training changes every row. Whole ranges of zeros are what is left where the parts of a tensor that lay on other
devices were not gathered when the adapter was saved.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.measured import without_factors
from loratools.checks.common.observation import Observation, Unobserved
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "values"
FIX = "save the adapter again, with the parts of all devices gathered"


def observe(subject: Subject) -> Iterator[Observation | Unobserved]:
    """Modules of which more than half of the outputs do not change."""
    yield from without_factors(subject.modules)
    lost = tuple(
        f"{name}: {module.zero_rows:,} of {module.rows:,} rows"
        for name, module in (subject.modules or {}).items()
        if module.norm and module.rows and 2 * module.zero_rows > module.rows
    )
    if lost:
        yield Observation(f"most rows of B are zeros in {counted(len(lost), 'module')}", lost)
