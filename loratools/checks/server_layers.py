"""The program would apply the adapter to other layers or tokens than it was trained for.

An adapter of repeated layers counts layers that the base does not have, and one with invocation tokens (aLoRA) acts
after these only. A program that reads neither applies the factors everywhere, or to the wrong layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.programs import program
from loratools.checks.common.servers import SERVERS
from loratools.checks.common.subject import Subject
from loratools.errors import UnsupportedError
from loratools.formats import ensure_layers

SEVERITY = "error"
NEEDS = "program"
FIX = "merge it into its base where that is possible, or load it with PEFT"


def observe(subject: Subject) -> Iterator[Observation]:
    """What the adapter says of layers and tokens, where the program does not read it."""
    if subject.program is None or subject.adapter is None:
        return
    client = subject.program if subject.program in SERVERS else program(subject.program).format
    try:
        ensure_layers(subject.adapter, client)
    except UnsupportedError as error:
        yield Observation(error.message, (), error.hint)
