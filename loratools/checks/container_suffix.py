"""A file's suffix is that of another kind of file than its content is.

Programs choose how to read a file by its suffix: some load a pickle that they would have refused under its own name,
others fail.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "rename the file"

_SUFFIXES = {
    "safetensors": (".safetensors",),
    "pickle": (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
    "npz": (".npz",),
    "gguf": (".gguf",),
}


def observe(subject: Subject) -> Iterator[Observation]:
    """The file, where its content decided how it was read, and its name says something else."""
    source = subject.source
    if source is None:
        return
    suffixes = _SUFFIXES[source.container]
    # A file without a suffix claims nothing.
    if source.file.suffix and source.file.suffix.lower() not in suffixes:
        yield Observation(
            f"{quoted(source.file.name)} is a {source.container} file by its content",
            (source.file.name,),
            f"give it the suffix {suffixes[0]}",
        )
