"""The order of the rows of some modules is not known.

Formats store heads, or queries, keys and values, in orders that depend on the model. Taken for another order, the rows
belong to other outputs, and nothing shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "warning"
NEEDS = "headers"
FIX = "name the model, whose config tells the order: --base BASE"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the reader is not certain of; of PEFT it is the rank, and of experts their packing."""
    adapter = subject.adapter
    if adapter is None:
        return
    questions = adapter.uncertainties if adapter.format != "peft" else ()
    experts = adapter.undecided_experts
    if questions or experts:
        yield Observation("the order of rows or columns is not certain", (*questions, *experts))
