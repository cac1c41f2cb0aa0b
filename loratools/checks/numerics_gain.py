"""A part of the update is lost when it is merged into the base and rounded to its dtype.

Where an update is smaller than half of the step between two numbers of the base's dtype, the sum rounds back to the
base. What is merged is then weaker than what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import few
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "warning"
NEEDS = "base"
FIX = "merge with --rounding stochastic or --rounding adapter, or with --dtype float32"

_LEAST = 0.99


def observe(subject: Subject) -> Iterator[Observation]:
    """The modules that lose more than a hundredth of their update, each with what is left."""
    lost = {name: gain for name, gain in (subject.gains or {}).items() if gain < _LEAST}
    if lost:
        worst = min(lost, key=lambda name: lost[name])
        yield Observation(
            f"rounding to the base's dtype loses a part of {counted(len(lost), 'update')}; "
            f"of that of {few([worst])} {lost[worst]:.1%} is left",
            tuple(f"{name}: {gain:.1%}" for name, gain in sorted(lost.items(), key=lambda pair: pair[1])),
        )
