"""Indices that adapters store: integers of any width, or floats that hold integers (PEFT's on Windows)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import FormatError
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_indices(tensor: LazyTensor, size: int, owner: str) -> NDArray[np.int64]:
    """All values, each in 0:size.

    Raises:
        FormatError: One is outside; numpy would count a negative one from the end.
    """
    import numpy as np

    indices: NDArray[np.int64] = np.asarray(tensor.read().long().numpy())
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise FormatError(
            f"{owner} has indices from {indices.min()} to {indices.max()}, and there are {size} places",
            hint="the adapter belongs to another base, or its file is damaged",
        )
    return indices
