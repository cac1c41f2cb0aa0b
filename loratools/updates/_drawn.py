"""Places in a weight that PEFT does not store: it draws them from a seed, with torch's generator on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def drawn_places(rows: int, columns: int, count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of `count` distinct elements of a matrix, in the order in which they were drawn."""
    import numpy as np
    import torch

    places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    row, column = np.divmod(places, columns)
    return row, column
