"""An error that prevents reading one of many sources, as an error of ours; the others are still read."""

from __future__ import annotations

from loratools.errors import InputError, LoraToolsError


def as_ours(error: LoraToolsError | OSError) -> LoraToolsError:
    """The error, in words of ours where it is the system's."""
    if isinstance(error, LoraToolsError):
        return error
    return InputError(f"it cannot be read: {(error.strerror or str(error)).lower()}")
