"""How work units run: one file per execution mode, each with a `run` of the same signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from loratools import registry


class Runner(Protocol):
    """The signature of `run`: call `work` on every unit, and return results in the order of the units or raise the
    first error.

    `on_result` is called with each unit and its result as it arrives, one at a time, on the caller's thread. Changes
    that `work` makes in memory may be lost: only its result and what it writes to disk count.
    """

    def __call__(
        self,
        units: Sequence[Any],
        work: Callable[[Any], Any],
        *,
        threads: int,
        on_result: Callable[[Any, Any], None] = ...,
    ) -> list[Any]: ...


def runner(name: str) -> Runner:
    """The `run` function of the execution mode with this name.

    Raises:
        UsageError: There is no such mode.
    """
    run: Runner = registry.load("execution", name).run
    return run
