"""The weights are stored as a pickle.

Loading a pickle can run code, so that many programs refuse it. This one was read without running anything; as
safetensors it holds the same values, and no code can be in it.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "write it as safetensors: loratools convert ADAPTER -o OUT --to peft"


def observe(subject: Subject) -> Iterator[Observation]:
    """The file of an adapter, and the files of a model, that are pickles."""
    if subject.source is not None:
        if subject.source.container == "pickle":
            yield Observation(f"{quoted(subject.source.file.name)} is a pickle", (subject.source.file.name,))
        return
    pickles = [path.name for path in subject.files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if subject.checkpoint is not None and pickles:
        yield Observation(
            f"the weights are pickles: {quoted(pickles[0])}", tuple(pickles), "save the model with safe_serialization"
        )
