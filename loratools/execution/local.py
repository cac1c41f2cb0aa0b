"""Run work units on threads of this process.

torch, numpy and system calls release the interpreter while they work, so threads read, compute and write in parallel:
while one waits for the disk, another multiplies. If units are many short calls, the hand-over between threads costs as
much as the work; `forked` avoids that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def worker_count(threads: int | None) -> int:
    """The number of workers: as requested, else one for each CPU that this process may run on."""
    if threads is not None:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """A context in which torch operations use only the thread that calls them.

    So the bytes of a result do not depend on the number of workers, which keep the cores busy.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    units: Sequence[Unit],
    work: Callable[[Unit], Result],
    *,
    threads: int,
    on_result: Callable[[Unit, Result], None] = lambda unit, result: None,
) -> list[Result]:
    """Run `work` on every unit in threads of this process.

    Results are in the order of the units. The first error stops the rest and is raised.

    on_result: called with each unit and its result as it arrives, one at a time, on the thread that called `run`.
    """
    results: dict[int, Result] = {}
    waiting: dict[Future[Result], int] = {}
    todo: Iterable[tuple[int, Unit]] = iter(enumerate(units))
    with ThreadPoolExecutor(threads, thread_name_prefix="loratools") as pool:
        try:
            # A short queue: after an error or an interrupt there is little left to wait for.
            while True:
                for i, unit in islice(todo, 2 * threads - len(waiting)):
                    # Inputs that are held for the caller are held for the threads as well.
                    waiting[pool.submit(copy_context().run, work, unit)] = i
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED)[0]:
                    i = waiting.pop(future)
                    results[i] = future.result()
                    on_result(units[i], results[i])
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
    return [results[i] for i in range(len(results))]
