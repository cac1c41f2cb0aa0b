"""Tensors set aside in files until they are written in their place, so that what grows with a model stays out of
memory; and, where the run can be resumed, for another run that goes on with it.

What is set aside belongs to a unit of work, by its name. Of a run that can be resumed, the journal says of each unit in
which file its tensors are, with a checksum of their bytes, and what was measured on it. A run that goes on reads every
unit back when it comes to it, and does again what is not as it was noted: so files and journal need no order in which
they reach the disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from loratools.storage import system
from loratools.storage.checksum import Checksum
from loratools.storage.commit import scratch_folder
from loratools.storage.files import close_inputs, identify, machine_error, write_at
from loratools.storage.resumption import Resumable
from loratools.storage.staging import Staging
from loratools.storage.stored import stored
from loratools.tensors.dtypes import DTYPE_BITS, dtype_name
from loratools.tensors.lazy import LazyTensor, from_torch

if TYPE_CHECKING:
    from torch import Tensor

# The dtype and shape of a tensor, and where in its file it begins.
_Place: TypeAlias = "tuple[str, tuple[int, ...], int]"


@dataclass(frozen=True)
class FinishedUnit:
    """A unit of work that is done.

    Attributes:
        tensors: Its tensors, by the names that they were set aside under.
        facts: What was noted of it, as JSON has it.
    """

    tensors: Mapping[str, LazyTensor]
    facts: Mapping[str, Any]


class WorkStore(Protocol):
    """Where the tensors of finished units wait. Several threads may use it at once."""

    @property
    def outlives_run(self) -> bool:
        """Whether another run can go on with what is set aside."""

    def keep(self, unit: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> dict[str, LazyTensor]:
        """Set the tensors of a unit aside; return the same tensors, by the same names."""

    def finished(self, unit: str) -> FinishedUnit | None:
        """What a killed run has done of a unit; None if it must be done."""


class MemoryStore:
    """Tensors that wait in memory, and are gone with the run."""

    outlives_run: ClassVar[bool] = False

    def keep(self, unit: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> dict[str, LazyTensor]:
        return {name: from_torch(values) for name, values in tensors.items()}

    def finished(self, unit: str) -> FinishedUnit | None:
        return None


class Scratch:
    """Tensors that wait in a folder, in one file for each unit.

    Attributes:
        resumed: Whether the folder is that of a killed run.
        outlives_run: Whether another run can go on with what is set aside.
    """

    def __init__(self, prepared: Staging) -> None:
        self.resumed = prepared.resumed
        self.outlives_run = prepared.keeps_work
        self._folder = prepared.path
        self._journal = prepared.journal if prepared.keeps_work else None
        self._lock = Lock()
        self._names: set[str] = set()
        self._reused: set[str] = set()
        noted = self._journal.units if self._journal is not None and prepared.resumed else {}
        self._noted = {unit: parsed for unit, line in noted.items() if (parsed := _NotedUnit.of(line)) is not None}
        files = {unit.file for unit in self._noted.values() if unit.file is not None}
        if prepared.resumed:
            prepared.keep_only(files)
        self._numbers = itertools.count(1 + max((int(name) for name in files), default=-1))

    def keep(self, unit: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> dict[str, LazyTensor]:
        """Set the tensors of a unit aside, and note that it is done; return the same tensors, by the same names.

        Raises:
            MachineError: The disk is full, or there is no permission.
        """
        with self._lock:
            name = str(next(self._numbers)) if tensors else None
        noted = self._written(name, tensors, facts)
        with self._lock:
            self._names.add(unit)
            if self._journal is not None:
                self._journal.note(unit, noted.to_dict())
        return noted.tensors(self._folder)

    def finished(self, unit: str) -> FinishedUnit | None:
        """What a killed run has done of a unit, read back and compared with its checksum; None if it must be done.

        Raises:
            MachineError: The disk failed.
        """
        noted = self._noted.get(unit)
        if noted is None or not self._is_as_noted(noted):
            return None
        with self._lock:
            self._names.add(unit)
            self._reused.add(unit)
        return FinishedUnit(noted.tensors(self._folder), noted.facts)

    @property
    def counts(self) -> tuple[int, int]:
        """How many units a killed run had done, and how many are done now."""
        return len(self._reused), len(self._names)

    def _written(self, file: str | None, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> _NotedUnit:
        """Write tensors one after the other; the line of the journal about them."""
        import torch

        places: dict[str, _Place] = {}
        checksum = Checksum()
        end = 0
        if file is not None:
            path = self._folder / file
            try:
                fd = system.create(path)
                try:
                    for name, values in tensors.items():
                        data = values.detach().contiguous().flatten().view(torch.uint8).numpy().data
                        places[name] = dtype_name(values.dtype), tuple(values.shape), end
                        write_at(fd, data, end, path=path)
                        if self._journal is not None:
                            checksum.add(data)
                        end += len(data)
                finally:
                    system.close(fd)
            except OSError as error:
                raise machine_error(error, "write", path) from error
        return _NotedUnit(file, end, checksum.hexdigest(), places, facts)

    def _is_as_noted(self, unit: _NotedUnit) -> bool:
        if unit.file is None:
            return True
        path = self._folder / unit.file
        try:
            fd = system.open_to_read(path)
            try:
                if system.fstat(fd).st_size != unit.nbytes:
                    return False
                checksum = Checksum()
                checksum.add_written(fd, 0, unit.nbytes)
            finally:
                system.close(fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise machine_error(error, "read", path) from error
        return checksum.hexdigest() == unit.checksum


@dataclass(frozen=True)
class _NotedUnit:
    """A line of the journal: the file of a unit, where each tensor begins in it, and what was measured."""

    file: str | None
    nbytes: int
    checksum: str
    places: Mapping[str, _Place]
    facts: Mapping[str, Any]

    def tensors(self, folder: Path) -> dict[str, LazyTensor]:
        """The tensors, which lie in the file."""
        if self.file is None:
            return {}
        file = identify(folder / self.file)
        return {name: stored(file, start, shape, dtype) for name, (dtype, shape, start) in self.places.items()}

    def to_dict(self) -> dict[str, object]:
        return {
            "file": self.file,
            "bytes": self.nbytes,
            "checksum": self.checksum,
            "tensors": self.places,
            "facts": self.facts,
        }

    @classmethod
    def of(cls, line: object) -> _NotedUnit | None:
        """What a line is about; None if it is not as we write it."""
        match line:
            case {
                "file": str() | None as file, "bytes": int(nbytes), "checksum": str(checksum),
                "tensors": dict(tensors), "facts": dict(facts),
            } if file is None or (file.isascii() and file.isdecimal()):  # fmt: skip
                places = {name: place for name, entry in tensors.items() if (place := _place(entry)) is not None}
                return cls(file, nbytes, checksum, places, facts) if len(places) == len(tensors) else None
        return None


def _place(entry: object) -> _Place | None:
    match entry:
        case [str(dtype), list(shape), int(start)] if dtype in DTYPE_BITS and all(type(n) is int for n in shape):
            return dtype, tuple(shape), start
    return None


@contextmanager
def scratch_beside(out: Path, resumable: Resumable | None = None) -> Iterator[Scratch]:
    """A place for tensors on the disk of `out`, gone when the block ends, unless another run may go on with it.

    Raises:
        MachineError: There is no permission.
    """
    with scratch_folder(out, resumable=resumable) as prepared:
        try:
            yield Scratch(prepared)
        finally:
            close_inputs()  # a file that is open cannot be removed everywhere
