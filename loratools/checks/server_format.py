"""The adapter is stored in a format that the program does not load.

Formats differ in names, in the order of rows and in where the scale is, so that a file of another format is refused, or
loaded without any effect.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.programs import program
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "program"
FIX = "convert it to a format that the program loads: loratools convert ADAPTER -o OUT --to FORMAT"


def observe(subject: Subject) -> Iterator[Observation]:
    """The format, where it is not one of the program's."""
    if subject.program is None or subject.adapter is None:
        return
    wanted = program(subject.program)
    if subject.adapter.format not in wanted.reads:
        yield Observation(
            f"it is stored as {subject.adapter.format}, and {subject.program} loads {', '.join(sorted(wanted.reads))}",
            (subject.adapter.format,),
            f"convert it for the program: loratools convert ADAPTER -o OUT {wanted.convert}",
        )
