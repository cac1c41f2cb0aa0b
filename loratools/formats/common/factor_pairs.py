"""Two factors of every module, checked to make a product; all faults are raised at once."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.errors import FormatError
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor


def paired(
    source: AdapterSource, parts: Mapping[str, Mapping[str, LazyTensor]], down: str, up: str
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """A: (rank, in) and B: (out, rank) of every module; `down` and `up` are what the format calls them.

    Raises:
        FormatError: One is missing, is no matrix of numbers with a fraction, or has another rank.
    """
    problems: list[str] = []
    pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    for module, factors in sorted(parts.items()):
        if missing := [part for part in (down, up) if part not in factors]:
            problems.append(f"{quoted(module)} has no {missing[0]}")
            continue
        a, b = factors[down], factors[up]
        if any(len(t.shape) != 2 or t.dtype[0] not in "FB" or t.dtype == "BOOL" for t in (a, b)):
            problems.append(f"{quoted(module)} has {down} {a.dtype} {list(a.shape)} and {up} {b.dtype} {list(b.shape)}")
        elif a.shape[0] != b.shape[1]:
            problems.append(
                f"{quoted(module)} has {down} {list(a.shape)} and {up} {list(b.shape)}, which have different ranks"
            )
        pairs[module] = a, b
    if problems:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(problems), 'fault')} in its factors", details=shown(problems)
        )
    return pairs
