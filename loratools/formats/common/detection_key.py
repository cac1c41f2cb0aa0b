"""What a format can tell a file by where it holds nothing but named tensors: the same for thousands of adapters.

Everything that a `detect` looks at is in it, so that an answer for one file is the answer for every file with the same:
all names in their order with all shapes and dtypes, and which fields the header has.
"""

from __future__ import annotations

from typing import NamedTuple

from loratools.formats.common.source import AdapterSource

# Answers for larger files are not worth the memory: a person has thousands of small ones, and a few large ones.
_MOST_TENSORS = 8192


class DetectionKey(NamedTuple):
    """The names, shapes and dtypes of a file's tensors in the order of the file, and the fields of its header."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    header_fields: frozenset[str]


def detection_key(source: AdapterSource) -> DetectionKey | None:
    """What formats tell the source by; None of one that has more to it than a safetensors file with named tensors."""
    tensors = source.tensors
    has_more = source.config is not None or source.base is not None or source.other or source.packed
    if has_more or source.container != "safetensors" or len(tensors) > _MOST_TENSORS:
        return None
    return DetectionKey(
        tuple(tensors),
        tuple([tensor.shape for tensor in tensors.values()]),
        tuple([tensor.dtype for tensor in tensors.values()]),
        frozenset(source.metadata),
    )
