"""The work of a run that another one can go on with: where its finished units wait, and what is said of a killed run.

The units wait in a hidden folder beside the output (`storage/scratch.py`), which is gone when the output is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import UsageError
from loratools.ops.common.abandoned import abandoned_warnings, resumed_remarks
from loratools.storage.resumption import Resumable, RunPlan
from loratools.storage.scratch import MemoryStore, Scratch, WorkStore, scratch_beside

# Adapters of fewer bytes are made anew in a second or two; to set their work aside would cost a good part of that.
WORTH_KEEPING_BYTES = 64 << 20


@dataclass(frozen=True)
class ResumableWork:
    """A run whose finished units are kept.

    Attributes:
        store: Where they wait.
        abandoned: A sentence for each killed run for the same output that this one does not go on with.
    """

    store: WorkStore
    abandoned: tuple[str, ...] = ()
    _resumed_output: Path | None = None

    def remarks(self) -> list[str]:
        """What a person should know of killed runs, once all units are done."""
        if self._resumed_output is not None and isinstance(self.store, Scratch):
            return resumed_remarks(self._resumed_output, self.store.resumed, *self.store.counts)
        return list(self.abandoned)


def require_output(out: object, *, resume: bool) -> None:
    """Refuse to go on with a run that writes nothing.

    Raises:
        UsageError: There is no output, and one is to be resumed.
    """
    if resume and out is None:
        message = "resume needs an output: without one, nothing was written to go on with"
        raise UsageError(message, hint="name the output")


def is_worth_keeping(input_bytes: int, *, resume: bool) -> bool:
    """Whether finished work is kept for another run: where there is much, or where a person goes on with a run."""
    return resume or input_bytes >= WORTH_KEEPING_BYTES


@contextmanager
def resumable_work(
    out: Path | None, plan: Callable[[], RunPlan], *, resume: bool, input_bytes: int | None = None
) -> Iterator[ResumableWork]:
    """Give a place for the finished units of a run: on the disk of its output, or in memory if there is none.

    Args:
        out: The output; None where nothing is written.
        plan: Works out what the run is to do, which may take reading its inputs.
        resume: Whether to go on with a killed run of the same plan.
        input_bytes: Bytes of the tensors that are read. Where they are few, nothing is kept for another run; where they
            if None, what is done waits on the disk in any case.

    Raises:
        UsageError: The killed run had something else to do.
        ChangedInputError: The inputs are not those of the killed run.
        MachineError: There is no permission, or another run is writing the output.
    """
    if out is None:
        yield ResumableWork(MemoryStore())
        return
    abandoned = () if resume else tuple(abandoned_warnings(out))
    if input_bytes is not None and not is_worth_keeping(input_bytes, resume=resume):
        yield ResumableWork(MemoryStore(), abandoned)
        return
    with scratch_beside(out, Resumable(plan(), resume)) as scratch:
        yield ResumableWork(scratch, abandoned, out if resume else None)
