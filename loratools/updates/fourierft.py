"""FourierFT: `dW = scale * Re(ifft2(S))`, S zero but for a few trained coefficients at places that a seed draws.

Gao et al., 2024, https://arxiv.org/abs/2405.03003.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors import LazyTensor
from loratools.updates import Delta, Shape, Update
from loratools.updates._deltas import dense
from loratools.updates._drawn import drawn_places
from loratools.updates._peft import PeftModule
from loratools.updates._peft_fields import integer, number, shaped

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("fourierft_spectrum",)
PEFT_FIELDS = ("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights")


@dataclass(frozen=True)
class FourierFT:
    """`spectrum: (n,)`, for a weight of any size with at least n elements."""

    kind: ClassVar[str] = "fourierft"
    shape: ClassVar[Shape] = (None, None)
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    alpha_source: ClassVar[str] = "assumed"
    needs_base: ClassVar[bool] = False

    spectrum: LazyTensor
    scale: float
    seed: int

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"spectrum": self.spectrum}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and math.prod(shape) >= self.spectrum.elements

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        rows, columns = base.shape
        spectrum = np.zeros((rows, columns))
        spectrum[drawn_places(rows, columns, self.spectrum.elements, self.seed)] = read_array(self.spectrum, "F64")
        return dense(np.fft.ifft2(spectrum).real, self.scale * weight, dtype)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: the config has no number for the scale or the seed.
    """
    (spectrum,) = module.need(*PEFT_PARTS)
    shaped(module, fourierft_spectrum=(None,))
    return {"": FourierFT(spectrum, number(module, "scaling"), integer(module, "random_loc_seed"))}
