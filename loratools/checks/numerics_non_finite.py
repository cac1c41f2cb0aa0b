"""Values are NaN or infinite.

One such value makes every output of the model NaN. It is what a training that has diverged leaves, or a cast to float16
of values that it cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "error"
NEEDS = "values"
FIX = "take an earlier state of the training, or save the adapter in bfloat16 or float32"


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules and whole tensors with such values, each with their number."""
    counts = {name: module.non_finite for name, module in (subject.modules or {}).items() if module.non_finite}
    counts |= {name: count for name, count in (subject.tensors or {}).items() if count}
    if counts:
        places = counted(len(counts), "module or tensor", "modules or tensors")
        yield Observation(
            f"{counted(sum(counts.values()), 'value')} not finite in {places}",
            tuple(f"{name}: {count:,}" for name, count in counts.items()),
        )
