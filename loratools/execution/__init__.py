"""How work units run: one file per way, each with a `run` of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from loratools import registry


class Runner(Protocol):
    """The `run` of an entry: `work` on every unit, results in the order of the units, the first error raised.

    `on_result` is called with each unit and its result as it comes, one at a time, on the caller's thread. What `work`
    changes in memory may be lost: its result and what it wrote to disk are what counts.
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
    """The `run` of the entry of this name.

    Raises:
        UsageError: There is none.
    """
    run: Runner = registry.load("execution", name).run
    return run
