"""The self-check of a merge: rows read back from what was written, against `base + update` computed anew in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loratools.errors import LoraToolsError
from loratools.ops.merge.outputs import RowsUnit
from loratools.ops.merge.rows import prepared, read_rows
from loratools.storage.files import read_back

# Rows looked at in each unit: so many at its start, in its middle and at its end.
_ROWS = 3
# Units of no more weights are looked at in one piece: that costs less than to pick rows out of them.
_SMALL = 8192


def error_ratio(unit: RowsUnit, fd: int, offset: int) -> float:
    """The largest error in a sample of rows, as a share of what is allowed (`algebra.rounding.merge_error_bound`).

    Infinite where something is not a number. `offset` is where the whole tensor begins in the file `fd`.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, merge_error_bound, widen

    output = unit.output
    deltas = prepared(output, "F64", unit.start, unit.stop)
    terms = sum(d.terms for d in deltas)
    rows = _ROWS if (unit.stop - unit.start) * output.columns > _SMALL else unit.stop - unit.start
    last = max(unit.start, unit.stop - rows)
    worst = 0.0
    for start in sorted({unit.start, (unit.start + last) // 2, last}):
        stop = min(start + rows, unit.stop)
        base = read_rows(output, "F64", start, stop)
        stored = np.empty(base.shape, STORAGE[output.dtype])
        read_back(fd, stored.reshape(-1).view(np.uint8).data, offset + start * output.row_bytes)
        merged = np.empty_like(base)
        widen(stored, output.dtype, merged)
        exact, magnitude = base.copy(), np.zeros_like(base)
        for delta in deltas:
            delta.add_to(exact, start, base)
            delta.add_magnitude_to(magnitude, start, base)
        error = abs(merged - exact)
        nearest = output.rounding.mode == "nearest"
        bound = merge_error_bound(abs(base), magnitude, merged, output.dtype, terms, nearest=nearest)
        # Exact is exact, also where the bound is too small to be a number.
        ratio = np.divide(error, bound, out=np.zeros_like(error), where=error != 0)
        worst = max(worst, float(np.where(np.isnan(ratio), math.inf, ratio).max(initial=0.0)))
    return worst


def require_right(ratios: Mapping[str, float]) -> None:
    """Raise LoraToolsError where a tensor is further from the exact result than rounding explains: a bug of ours."""
    wrong = {name: ratio for name, ratio in ratios.items() if not ratio <= 1}
    if wrong:
        raise LoraToolsError(
            f"the self-check found {len(wrong)} merged weights that are not base + update",
            details=[f"{name}   {ratio:.3g} times the error that rounding explains" for name, ratio in wrong.items()],
            hint="this is a bug of loratools; nothing was written",
        )
