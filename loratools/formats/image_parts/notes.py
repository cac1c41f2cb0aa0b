"""What is noted of an adapter for an image model besides its tensors: its family, and what its header says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from loratools.adapter import Adapter

if TYPE_CHECKING:
    from loratools.formats.common.description import Description

# The key of these notes in `Adapter.notes`.
NOTES = "image"


class Described(NamedTuple):
    """What an image adapter is for, and what its header says; None if that is not known."""

    family: str | None = None
    description: Description | None = None


def described(adapter: Adapter) -> Described:
    """Return what is known of an adapter; nothing, unless it was read from the file of an image model."""
    notes = adapter.notes.get(NOTES)
    if not isinstance(notes, Mapping):
        return Described()
    # Here, because an adapter of a language model has no need of it.
    from loratools.formats.common.description import describe

    family, metadata = notes.get("family"), notes.get("metadata")
    return Described(
        family if isinstance(family, str) else None, describe(metadata) if isinstance(metadata, Mapping) else None
    )
