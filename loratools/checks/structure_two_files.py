"""The folder holds weights of the adapter twice.

One program reads the first file and another the second, so that an older state of the training may be what is run.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import ADAPTER_FILES
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "find out which file the training wrote last, and move the other one away"


def observe(subject: Subject) -> Iterator[Observation]:
    """The files that are not read beside the one that is."""
    source = subject.source
    if source is None or source.file.name not in ADAPTER_FILES or not source.path.is_dir():
        return
    other_files = tuple(name for name in ADAPTER_FILES if name != source.file.name and (source.folder / name).is_file())
    if other_files:
        yield Observation(
            f"{quoted(source.file.name)} is read, and {', '.join(map(quoted, other_files))} not", other_files
        )
