"""Low-pass reconstruction filters of orthogonal wavelets, by the names of PyWavelets; the numbers are in wavelets.json.

Daubechies, Ten Lectures on Wavelets, 1992: db and sym have as many vanishing moments as their number says, coif twice.
A filter determines all else: high-pass is the same backwards, with every other sign changed.

coif4 and coif5 are PEFT's: off by 2 % from the true ones, and what adapters were trained with.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path


@cache
def low_pass_filters() -> dict[str, tuple[float, ...]]:
    """Name of a wavelet -> its filter, of even length."""
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {name: tuple(taps) for name, taps in table.items()}
