"""Comparisons of converted modules with their sources as units of work: noted when they are done, for another run.

A module of the result is known again by a checksum of its tensors and by what it has beside them, so that a comparison
that is kept is one of the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.storage.checksum import Checksum
from loratools.storage.files import read_bytes
from loratools.storage.run_journal import RunJournal
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor, viewed

if TYPE_CHECKING:
    from loratools.ops.convert.verify import ConvertedModule

# Bytes of a tensor that are read at a time.
_PIECE = 1 << 22


@dataclass
class ComparedModules:
    """The comparisons of a run.

    Attributes:
        journal: Where they are noted; None for a run that cannot be resumed.
        resumed: Whether the journal is that of a killed run.
        reused: How many comparisons a killed run had made of the same values.
        compared: How many there are.
    """

    journal: RunJournal | None = None
    resumed: bool = False
    reused: int = 0
    compared: int = 0

    def once(
        self, what: str, tensors: Iterable[LazyTensor], numbers: object, compare: Callable[[], ConvertedModule]
    ) -> ConvertedModule:
        """Compare a module or weight, unless a killed run has compared the same values.

        Args:
            what: The module, or the weight in words.
            tensors: Its tensors in the result.
            numbers: What it has beside its tensors, such as its scale.
            compare: Compares it with its source.

        Raises:
            MachineError: The disk failed.
        """
        from loratools.ops.convert.verify import ConvertedModule

        identity = _identity(tensors, numbers) if self.journal is not None else None
        if self.journal is None or identity is None:
            return compare()
        self.compared += 1
        unit = f"comparison of {what}"
        match self.journal.units.get(unit) if self.resumed else None:
            case {"of": str(noted), "name": str(name), "error": float(error), "explained": bool(explained)} if (
                noted == identity
            ):
                self.reused += 1
                return ConvertedModule(name, error, explained)
        result = compare()
        self.journal.note(unit, {"of": identity, **vars(result)})
        return result


def _identity(tensors: Iterable[LazyTensor], numbers: object) -> str | None:
    """What tells these values from others; None where a tensor is not in a file as it is."""
    checksum = Checksum()
    added_ranges: set[ByteRange] = set()
    shapes = []
    for tensor in tensors:
        shapes.append((tensor.dtype, tensor.shape))
        for leaf in viewed(tensor):
            if leaf.location is None:
                return None
            if leaf.location in added_ranges:
                continue
            added_ranges.add(leaf.location)
            for start in range(0, leaf.location.nbytes, _PIECE):
                checksum.add(memoryview(read_bytes(leaf.location, start, min(start + _PIECE, leaf.location.nbytes))))
    return f"{checksum.hexdigest()} {shapes!r} {numbers!r}"
