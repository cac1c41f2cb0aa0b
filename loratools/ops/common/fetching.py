"""Brings what a verb is about to read whole onto this machine, before its work and its bars begin."""

from __future__ import annotations

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.storage.deferred_files import download_all
from loratools.storage.origins import origin_of
from loratools.tensors.lazy import viewed


def fetch_values(*sources: Adapter | Checkpoint) -> None:
    """Download the files with the values of these sources, where they are not on this machine yet.

    Raises:
        MachineError: The hub refuses access or cannot be reached, or the disk is full.
    """
    for source in sources:
        if source.path is None or origin_of(source.path) is None:
            continue
        if isinstance(source, Checkpoint):
            download_all([file.file.path for file in source.files])
        else:
            parts = [part for tensor in source.tensors().values() for part in viewed(tensor)]
            download_all([part.location.file.path for part in parts if part.location is not None])
