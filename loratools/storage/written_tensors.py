"""Tensors of the files of an output, noted in the journal of the run when they are written, for a run that goes on.

While `noting_tensors` is active, a writer of one of the files in the prepared folder asks for each tensor whose bytes
have to be computed whether a killed run has written it. It is read back and compared with its checksum, and written
again where it is not as it was noted: so files and journal need no order in which they reach the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loratools.storage.checksum import Checksum
from loratools.storage.commit import rewritten_file
from loratools.storage.staging import Staging
from loratools.storage.streamed_file import StreamedFile

# Between the name of a file and that of a tensor in the name of a unit; no name of a file has it.
_IN = "/"


class WrittenTensors:
    """The tensors that a run has written, by file and name.

    Attributes:
        reused: How many of a killed run were as they were noted.
        written: How many are written in all.
    """

    def __init__(self, prepared: Staging) -> None:
        self.folder = prepared.path
        self.reused = self.written = 0
        self._journal = prepared.journal
        units = prepared.journal.units if prepared.journal is not None and prepared.resumed else {}
        # Other units of the run are no tensors, and have more to say.
        self._noted = {unit: noted for unit, noted in units.items() if isinstance(noted, str)}
        if prepared.resumed:
            prepared.keep_only({unit.partition(_IN)[0] for unit in self._noted})

    def write_once(self, file: StreamedFile, name: str, write: Callable[[Checksum | None], None]) -> None:
        """Have a tensor written, unless a killed run has.

        Args:
            file: The file that it is in.
            name: Its name.
            write: Writes it, and adds its bytes to a checksum.

        Raises:
            MachineError: The disk is full or failed.
        """
        if self._keeps(file, name):
            return
        checksum = Checksum()
        write(checksum)
        self.written += 1
        if self._journal is not None:
            self._journal.note(file.path.name + _IN + name, checksum.hexdigest())

    def _keeps(self, file: StreamedFile, name: str) -> bool:
        """Whether the bytes of a tensor are in the file as a killed run has noted them; they count as written then.

        Raises:
            MachineError: The disk failed.
        """
        expected = self._noted.get(file.path.name + _IN + name)
        if expected is None:
            return False
        checksum = Checksum()
        with file.opened() as fd:
            checksum.add_written(fd, file.offset(name), file.size_of(name))
        if checksum.hexdigest() != expected:
            return False
        file.account(name, 0, file.size_of(name))
        self.reused += 1
        self.written += 1
        return True


_current: ContextVar[WrittenTensors | None] = ContextVar("written_tensors", default=None)


@contextmanager
def noting_tensors(prepared: Staging) -> Iterator[WrittenTensors]:
    """Within, tensors of files in the prepared folder are noted, and those of a killed run are kept.

    Raises:
        MachineError: What else the killed run has left cannot be removed.
    """
    tensors = WrittenTensors(prepared)
    token = _current.set(tensors)
    try:
        yield tensors
    finally:
        _current.reset(token)


@contextmanager
def file_of_output(path: Path) -> Iterator[tuple[Path, WrittenTensors | None]]:
    """Give the path to write a file of an output to, and where its tensors are noted; None if they are not.

    A file whose tensors are not noted appears complete or not at all. One whose tensors are is written in its place,
    so that another run can go on with it.

    Raises:
        MachineError: The disk is full, or there is no permission.
    """
    tensors = _current.get()
    if tensors is not None and path.parent == tensors.folder:
        yield path, tensors
        return
    with rewritten_file(path) as staged:
        yield staged, None
