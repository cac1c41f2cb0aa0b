"""Factors have a smaller rank than they have rows and columns.

Some columns of B, or rows of A, are combinations of others, so that the adapter could be smaller without any loss. It
is what is left of filling up with zeros, and of trainings whose directions fell together.
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
    """Modules that lack some of their rank, but not most of it."""
    yield from without_factors(subject.modules)
    deficient = tuple(
        f"{name}: {module.numerical_rank} of {module.rank}"
        for name, module in (subject.modules or {}).items()
        if module.norm and module.rank and module.rows and module.numerical_rank is not None
        if module.numerical_rank < min(module.rank, module.rows, module.size // module.rows)
        and 2 * module.numerical_rank >= module.rank
    )
    if deficient:
        yield Observation(f"the factors of {counted(len(deficient), 'module')} are rank-deficient", deficient)
