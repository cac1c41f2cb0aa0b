"""Who gets to know what is fetched: which revision an address means, and what is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Gets to know what happens between an address and its files."""

    def pinned(self, address: str, commit: str, note: str | None) -> None:
        """An address means a commit from now on; `note`: what is remarkable about that."""

    def downloading(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """A file is downloaded within; called with the bytes that have come since the last call."""


listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
# Whether only what is on this machine may be used, in this context.
offline: ContextVar[bool] = ContextVar("offline", default=False)
