"""WaveFT: `dW = scale * idwt2(S)`, S zero but for a few trained wavelet coefficients at places that a seed draws.

Bilican et al., 2025, https://arxiv.org/abs/2505.12532. One level of the inverse transform; without it S itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.drawn import DrawnSpectrum
from loratools.updates.parts.peft_fields import chosen, integer, number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Update
from loratools.updates.parts.wavelets import low_pass_filters

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("waveft_spectrum",)
PEFT_FIELDS = (
    "n_frequency",
    "scaling",
    "wavelet_family",
    "use_idwt",
    "random_loc_seed",
    "n_frequency_pattern",
    "proportional_parameters",
    "init_weights",
)


@dataclass(frozen=True)
class WaveFT(DrawnSpectrum):
    """A WaveFT update: one level of the inverse wavelet transform of a sparse spectrum.

    Attributes:
        wavelet: The wavelet by the name that PyWavelets gives it; None if S itself is the delta.
    """

    kind: ClassVar[str] = "waveft"

    wavelet: str | None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        rows, columns = base.shape
        low = low_pass_filters()[self.wavelet] if self.wavelet is not None else ()
        # The transform shortens each side by the filter's length less two, and has an even number of coefficients.
        margin = max(0, len(low) - 2)
        height, width = rows + margin, columns + margin
        if self.wavelet is not None:
            height, width = height + height % 2, width + width % 2
        spectrum = self.coefficients(rows, columns, (height, width))
        if self.wavelet is None:
            return dense(spectrum, self.scale * weight, dtype)
        # What lies beside the smooth part is detail from row to row, and what lies below it from column to column.
        up, left = height // 2, width // 2
        row_details = spectrum[:up, left:].copy()
        spectrum[:up, left:], spectrum[up:, :left] = spectrum[up:, :left], row_details
        values = _synthesis(_synthesis(spectrum, low).T, low).T
        above, left = (values.shape[0] - rows) // 2, (values.shape[1] - columns) // 2
        return dense(values[above : above + rows, left : left + columns], self.scale * weight, dtype)


def _synthesis(coefficients: Floats, low: Sequence[float]) -> Floats:
    """One level of the inverse transform along the first axis: smooth coefficients in its first half, details after."""
    import numpy as np

    half, taps = coefficients.shape[0] // 2, len(low)
    high = [(-1) ** i * value for i, value in enumerate(reversed(low))]
    full = np.zeros((2 * (half - 1) + taps, coefficients.shape[1]))
    for tap in range(taps):
        full[tap : tap + 2 * half : 2] += low[tap] * coefficients[:half] + high[tap] * coefficients[half:]
    cut = taps - 2
    return full[cut : full.shape[0] - cut]


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: a wavelet that PEFT has no filter of.
    FormatError: the config has no number for the scale or the seed.
    """
    (spectrum,) = module.need(*PEFT_PARTS)
    shaped(module, waveft_spectrum=(None,))
    wavelet = None
    if module.config.get("use_idwt", True):
        wavelet = chosen(module, "wavelet_family", tuple(low_pass_filters()), "db1")
    return {"": WaveFT(spectrum, number(module, "scaling"), integer(module, "random_loc_seed"), wavelet)}
