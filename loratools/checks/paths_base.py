"""The base model is named by a path of some machine.

Nobody else has this path, so that programs do not find the base; and it tells people about the machine and its user.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.machine_paths import is_machine_path
from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "put the name of the model on the Hub into base_model_name_or_path of adapter_config.json"


def observe(subject: Subject) -> Iterator[Observation]:
    """The recorded base, where it is an absolute path or one that begins in a home folder."""
    base = subject.adapter.base_model if subject.adapter is not None else subject.config.get("base_model_name_or_path")
    if isinstance(base, str) and is_machine_path(base):
        yield Observation(f"the base model is recorded as {quoted(base)}", (base,))
