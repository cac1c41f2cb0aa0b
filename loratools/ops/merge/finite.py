"""Refuses adapters whose values are not finite, naming every tensor."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.errors import InputError
from loratools.storage.arrays import read_array
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor

# Elements looked at in one go.
_LOOK = 1 << 18


def refuse_not_finite(tensors: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    """Raise InputError where values are not finite, naming every tensor by whose it is."""
    bad = [
        f"'{whose}'   {name}"
        for whose, named in tensors.items()
        for name, tensor in named.items()
        if tensor.dtype in FLOAT_DTYPES and not _is_finite(tensor)
    ]
    if bad:
        raise InputError(
            f"{len(bad)} tensors of the adapters hold values that are not finite",
            details=bad,
            hint="the training run diverged; take an earlier checkpoint, or leave these out with --exclude",
        )


def _is_finite(tensor: LazyTensor) -> bool:
    """Whether all values are, read in blocks of rows: a saved embedding may be larger than all else that is held."""
    import numpy as np

    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _LOOK // max(1, tensor.elements // max(1, rows)))
    return all(np.isfinite(read_array(tensor, "F32", i, min(i + step, rows))).all() for i in range(0, rows, step))
