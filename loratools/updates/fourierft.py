"""FourierFT: `dW = scale * Re(ifft2(S))`, S zero but for a few trained coefficients at places that a seed draws.

Gao et al., 2024, https://arxiv.org/abs/2405.03003.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.drawn import DrawnSpectrum
from loratools.updates.parts.peft_fields import integer, number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Update

PEFT_PARTS = ("fourierft_spectrum",)
PEFT_FIELDS = ("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights")


@dataclass(frozen=True)
class FourierFT(DrawnSpectrum):
    """A FourierFT update: the real part of the inverse Fourier transform of a sparse spectrum."""

    kind: ClassVar[str] = "fourierft"

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        rows, columns = base.shape
        return dense(np.fft.ifft2(self.coefficients(rows, columns)).real, self.scale * weight, dtype)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: the config has no number for the scale or the seed.
    """
    (spectrum,) = module.need(*PEFT_PARTS)
    shaped(module, fourierft_spectrum=(None,))
    return {"": FourierFT(spectrum, number(module, "scaling"), integer(module, "random_loc_seed"))}
