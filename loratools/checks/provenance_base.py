"""The adapter records another base than the one that was given.

Models of one family have equal names and sizes, so that an adapter fits the wrong one of them as well, and makes
something of it that nobody trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.base import Base
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "base"
FIX = "give the recorded base, or correct base_model_name_or_path if this is the same model under another name"


def observe(subject: Subject) -> Iterator[Observation]:
    """Both names, where the last part of neither is that of the other."""
    if subject.adapter is None or subject.base is None or subject.base.path is None:
        return
    recorded = subject.adapter.base_model
    if recorded and _last(recorded) not in _names(subject.base):
        yield Observation(
            f"the base is recorded as {quoted(recorded)}, and {quoted(subject.base.path.name)} was given", (recorded,)
        )


def _names(base: Base) -> set[str]:
    """What the base may be called: by its folder, by the hub's cache that it lies in, and by its own config."""
    assert base.path is not None
    path = base.path.absolute()
    names = {path.name, path.stem, path.parent.name} if path.is_file() else {path.name}
    names |= {part.rpartition("--")[2] for part in path.parts if part.startswith("models--")}
    recorded = base.config.get("_name_or_path")
    names |= {recorded} if isinstance(recorded, str) and recorded else set()
    return {_last(name) for name in names}


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
