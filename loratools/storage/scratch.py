"""Tensors set aside in files until they are written in their place, so that what grows with a model stays out of
memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.storage import system
from loratools.storage.commit import scratch_folder
from loratools.storage.files import close_inputs, identify, machine_error, write_at
from loratools.storage.stored import stored
from loratools.tensors.dtypes import dtype_name
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor


class Scratch:
    """Its folder, and one file for each call. Several threads may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
        """The same tensors, by the same names, in a file.

        Raises:
            MachineError: the disk is full, or there is no permission.
        """
        import torch

        path = self._folder / str(next(self._numbers))
        offsets: dict[str, int] = {}
        try:
            fd = system.create(path)
            try:
                end = 0
                for name, values in tensors.items():
                    data = values.detach().contiguous().flatten().view(torch.uint8).numpy().data
                    offsets[name] = end
                    write_at(fd, data, end, path=path)
                    end += len(data)
            finally:
                system.close(fd)
        except OSError as error:
            raise machine_error(error, "write", path) from error
        file = identify(path)
        return {n: stored(file, offsets[n], tuple(t.shape), dtype_name(t.dtype)) for n, t in tensors.items()}


@contextmanager
def scratch_beside(out: Path) -> Iterator[Scratch]:
    """A place for tensors on the disk of `out`, gone when the block ends, however it ends.

    Raises:
        MachineError: there is no permission.
    """
    with scratch_folder(out) as prepared:
        try:
            yield Scratch(prepared.path)
        finally:
            close_inputs()  # a file that is open cannot be removed everywhere
