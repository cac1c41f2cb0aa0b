"""The config says an alpha of 0.

With an alpha of 0 the adapter changes nothing, and nobody trains like that: the writer of the config did not know the
alpha.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.names import counted_names
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject

SEVERITY = "error"
NEEDS = "headers"
FIX = "give the alpha that it was trained with: loratools convert ADAPTER -o FOLDER --to peft --alpha ALPHA"


def observe(subject: Subject) -> Iterator[Observation]:
    """The modules with such an alpha."""
    if subject.adapter is not None and (names := subject.adapter.without_alpha):
        yield Observation(f"alpha is 0 in {counted_names(names, 'module')}", names)
