"""The header or the config holds paths of some machine.

Programs write where they ran and what they read into the files that they save. It changes nothing of the result, and
tells people about the machine and its user.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.machine_paths import machine_paths
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "note"
NEEDS = "headers"
FIX = "remove the entries before the file is published"


def observe(subject: Subject) -> Iterator[Observation]:
    """Fields of the config and texts of the header in which there is such a path."""
    if subject.source is None:
        return
    places: dict[str, object] = {f"metadata {key}": text for key, text in subject.source.metadata.items()}
    places |= {f"config {key}": value for key, value in subject.config.items() if key != "base_model_name_or_path"}
    holding = [f"{place}: {paths[0]}" for place, value in places.items() if (paths := machine_paths(value))]
    if holding:
        yield Observation(f"paths of a machine in {counted(len(holding), 'entry', 'entries')}", tuple(holding))
