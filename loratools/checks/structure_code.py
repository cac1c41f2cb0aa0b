"""Python files lie beside the weights, or the config names some.

Programs that trust remote code run these files when they load the model. They were not run here. An adapter needs none.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted
from loratools.storage.files import quoted

SEVERITY = "warning"
NEEDS = "headers"
FIX = "read the code before you let any program trust it, or remove it"


def observe(subject: Subject) -> Iterator[Observation]:
    """The files, where the folder is the adapter's or the model's own, and what auto_map names."""
    source, checkpoint = subject.source, subject.checkpoint
    config = subject.config if checkpoint is None else checkpoint.config
    files: list[str] = []
    if (source is not None and source.config_belongs_to_file) or (checkpoint is not None and subject.path.is_dir()):
        files = sorted(path.name for path in subject.folder.iterdir() if path.suffix in (".py", ".pyc", ".so"))
    named = [f"auto_map of the config: {quoted(str(config['auto_map']))}"] if config.get("auto_map") else []
    if files or named:
        yield Observation(
            f"code comes with the weights, in {counted(len(files) + len(named), 'place')}", (*files, *named)
        )
