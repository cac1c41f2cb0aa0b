"""Fingerprints of adapters: equal where the updates are, whatever names, formats, scales and dtypes they are stored in.

For a few fixed random inputs x of each width, a fingerprint adds up `||dW x||^2` over all modules. That is the same for
a module under another name, for an alpha that is stored otherwise or baked into B, for q, k and v as one matrix, and up
to rounding for another dtype. Of a low-rank update it costs two thin products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.errors import LoraToolsError

_INPUTS = 16
# Between fingerprints of one adapter in float32 and in 8 bits lie some 1e-3, between those of neighbouring states of a
# training several per cent.
_SAME = 4e-3


def fingerprint(path: Path) -> tuple[float, ...] | None:
    """The sums for each random input; None where an update depends on a base, or cannot be read as factors."""
    import numpy as np

    from loratools import formats
    from loratools.ops.lowrank.factors import exact_factors

    sums = np.zeros(_INPUTS)
    inputs: dict[int, object] = {}
    try:
        adapter = formats.load(path)
        if not adapter.updates or adapter.replacements:
            return None
        for name, update in adapter.updates.items():
            factors = exact_factors(update, name, adapter.name)
            a, b = factors.a.numpy(), factors.b.numpy()
            width = a.shape[1]
            x = inputs.setdefault(width, np.random.default_rng(width).standard_normal((width, _INPUTS)))
            sums += np.square(b @ (a @ x)).sum(axis=0)
    except (LoraToolsError, OSError):
        return None
    return tuple(sums.tolist())


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
