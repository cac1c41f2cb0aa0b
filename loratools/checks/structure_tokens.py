"""The adapter has trained rows of single tokens.

The base's tokenizer does not know tokens that were added, and servers that load no embeddings run the model with other
values for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.checks.common.observation import Observation
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "note"
NEEDS = "headers"
FIX = "use the tokenizer that was saved with the adapter"


def observe(subject: Subject) -> Iterator[Observation]:
    """The tables and the numbers of their rows."""
    if subject.adapter is None:
        return
    tables = tuple(
        f"{name}: {counted(len(replacement.rows), 'row')}"
        for name, replacement in subject.adapter.replacements.items()
        if replacement.rows is not None
    )
    if tables:
        yield Observation(f"trained tokens in {counted(len(tables), 'table')}", tables)
