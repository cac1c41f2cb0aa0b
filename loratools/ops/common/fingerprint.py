"""Fingerprints of adapters: equal where the updates are, whatever names, formats, scales and dtypes they are stored in.

For a few fixed random inputs x of each width, a fingerprint adds up `||dW x||^2` over all modules. That is the same for
a module under another name, for an alpha that is stored otherwise or baked into B, for q, k and v as one matrix, and up
to rounding for another dtype. Of a low-rank update it costs two thin products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import LoraToolsError

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

_INPUTS = 16
# Between fingerprints of one adapter in float32 and in 8 bits lie some 1e-3, between those of neighbouring states of a
# training several per cent.
_SAME = 4e-3


class FingerprintSums:
    """The sums of a fingerprint, to which modules are added one after the other."""

    def __init__(self) -> None:
        import numpy as np

        self._sums = np.zeros(_INPUTS)
        self._inputs: dict[int, Floats] = {}

    def add(self, factors: Factors) -> None:
        """Add a module with these factors."""
        import numpy as np

        a, b = factors.a.numpy(), factors.b.numpy()
        width = a.shape[1]
        if width not in self._inputs:
            self._inputs[width] = np.random.default_rng(width).standard_normal((width, _INPUTS))
        self._sums += np.square(b @ (a @ self._inputs[width])).sum(axis=0)

    @property
    def sums(self) -> tuple[float, ...]:
        """The sum for each random input."""
        return tuple(self._sums.tolist())


def fingerprint(path: Path) -> tuple[float, ...] | None:
    """The sums for each random input; None if an update depends on a base, or cannot be read as factors."""
    from loratools import formats
    from loratools.ops.lowrank.factors import exact_factors

    try:
        adapter = formats.load(path)
        if not has_fingerprint(adapter):
            return None
        fingerprint_sums = FingerprintSums()
        for name, update in adapter.updates.items():
            fingerprint_sums.add(exact_factors(update, name, adapter.name))
    except (LoraToolsError, OSError):
        return None
    return fingerprint_sums.sums


def has_fingerprint(adapter: Adapter) -> bool:
    """Whether updates are all that the adapter has, and it has some."""
    return bool(adapter.updates) and not adapter.replacements


def same_values(fingerprints: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """Groups of paths whose fingerprints are the same up to rounding; those of zeros are left out."""
    norms = {path: math.sqrt(math.fsum(s * s for s in sums)) for path, sums in fingerprints.items()}
    paths = sorted((path for path in fingerprints if norms[path] > 0), key=lambda path: (norms[path], path))
    groups: list[list[str]] = []
    for at, path in enumerate(paths):
        for before in reversed(paths[:at]):
            if norms[path] - norms[before] > _SAME * norms[path]:
                groups.append([path])
                break
            if math.dist(fingerprints[path], fingerprints[before]) <= _SAME * norms[path]:
                next(group for group in groups if before in group).append(path)
                break
        else:
            groups.append([path])
    return [tuple(sorted(group)) for group in groups if len(group) > 1]
