"""Indices that adapters store: integers of any width, or floats that hold integers (PEFT's on Windows)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import FormatError
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_indices(tensor: LazyTensor, size: int, what: str) -> NDArray[np.int64]:
    """All values, each in 0:size.

    Raises:
        FormatError: one is outside; numpy would count a negative one from the end.
    """
    import numpy as np

    found: NDArray[np.int64] = np.asarray(tensor.read().long().numpy())
    if found.size and (int(found.min()) < 0 or int(found.max()) >= size):
        raise FormatError(
            f"{what} has indices from {found.min()} to {found.max()}, and there are {size} places",
            hint="the adapter belongs to another base, or its file is damaged",
        )
    return found
