"""Names in messages: few of them, with how many there are."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.formats.common.source import counted, shown
from loratools.storage.files import quoted


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names in quotation marks, and how many more there are."""
    return ", ".join(shown([quoted(name) for name in names], most))


def counted_names(names: Sequence[str], noun: str, plural: str | None = None) -> str:
    """A count with its noun, and the first names: `2 modules ('a', 'b')`."""
    return f"{counted(len(names), noun, plural)} ({few(names)})"
