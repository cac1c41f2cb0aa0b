"""Places in a weight that PEFT does not store: it draws them from a seed, with torch's generator on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.protocol import Shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats


@dataclass(frozen=True)
class DrawnSpectrum(UpdateDefaults):
    """A few coefficients of a transform, at places that a seed draws.

    Attributes:
        spectrum: The coefficients, unread: (n,). The weight may have any size with at least n elements.
        scale: What the transform is multiplied with.
        seed: The seed that the places are drawn with.
    """

    shape: ClassVar[Shape] = (None, None)
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    alpha_source: ClassVar[str] = "assumed"
    needs_base: ClassVar[bool] = False
    # A transform gives all rows or none.
    whole_delta: ClassVar[bool] = True

    spectrum: LazyTensor
    scale: float
    seed: int

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"spectrum": self.spectrum}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and math.prod(shape) >= self.spectrum.elements

    def factors(self) -> Factors | None:
        """None: of no low rank, and the tensors do not tell its shape."""
        return None

    def coefficients(self, rows: int, columns: int, within: tuple[int, int] | None = None) -> Floats:
        """All coefficients of a weight with this number of rows and columns, in the middle of a matrix of the size
        `within`.
        """
        import numpy as np

        height, width = within or (rows, columns)
        row, column = drawn_places(rows, columns, self.spectrum.elements, self.seed)
        spectrum = np.zeros((height, width))
        spectrum[row + (height - rows) // 2, column + (width - columns) // 2] = read_array(self.spectrum, "F64")
        return spectrum


def drawn_places(rows: int, columns: int, count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of `count` distinct elements of a matrix, in the order in which they were drawn."""
    import numpy as np
    import torch

    places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    row, column = np.divmod(places, columns)
    return row, column
