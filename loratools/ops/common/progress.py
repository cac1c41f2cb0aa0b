"""Reporting of progress: the bytes done since the last call, and to a progress bar also the total."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from loratools.updates.parts.protocol import Update


@runtime_checkable
class Bar(Protocol):
    """A callable for bytes just done that can show a share of the total."""

    def __call__(self, advance: int, /) -> None: ...

    def expect(self, total: int) -> None:
        """Take the number of bytes that there will be in all."""


def expect(progress: Callable[[int], None] | None, total: int) -> None:
    """Tell the total, which headers give, to a bar; a plain function has no use for it."""
    if isinstance(progress, Bar):
        progress.expect(total)


def bytes_of(updates: Iterable[Update]) -> int:
    """How many bytes the updates are stored in, as their headers have it."""
    return sum(tensor.nbytes for update in updates for tensor in update.parts.values())
