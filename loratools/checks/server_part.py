"""Parts of the adapter are not loaded by the program.

It refuses the adapter because of them, or leaves them out without a word, and runs another model than the one that was
trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.programs import program
from loratools.checks.common.subject import Subject
from loratools.checks.common.unloaded import unloaded
from loratools.formats.common.source import counted

SEVERITY = "error"
NEEDS = "program"
FIX = "merge the adapter into its base, and load the result"


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules and weights, each with the reason."""
    if (
        subject.program is None
        or subject.adapter is None
        or subject.adapter.format not in program(subject.program).reads
    ):
        return
    parts = unloaded(subject.adapter, subject.program, subject.base)
    if parts:
        yield Observation(
            f"{subject.program} does not load {counted(len(parts), 'part')}",
            tuple(f"{name}: {why}" for name, why in parts.items()),
        )
