"""The self-check of a merge: rows read back from what was written, against `base + update` computed anew in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools.errors import LoraToolsError
from loratools.ops.merge.outputs import Output, RowsUnit
from loratools.ops.merge.rows import AddedDelta, prepared, read_rows
from loratools.storage.files import read_back

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# Rows checked in each unit: this number at its start, in its middle and at its end.
_ROWS = 3
# Units of no more weights are looked at in one piece: that costs less than to pick rows out of them.
_SMALL = 8192


def error_ratio(unit: RowsUnit, fd: int, offset: int) -> float:
    """The largest error in a sample of rows, as a share of what is allowed (`algebra.rounding.merge_error_bound`).

    Infinite where something is not a number. `offset` is where the whole tensor begins in the file `fd`.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, widen

    output = unit.output
    deltas = prepared(output, "F64", unit.start, unit.stop)
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
        worst = max(worst, rows_error_ratio(output, deltas, start, base, merged))
    return worst


def rows_error_ratio(output: Output, deltas: Sequence[AddedDelta], start: int, base: Floats, merged: Floats) -> float:
    """The largest error in some rows, as a share of what one rounding allows; infinite where something is no number.

    Args:
        output: What is merged.
        deltas: All of its deltas, prepared in float64.
        start: The number of the first row.
        base: The rows of the base, (rows, columns), in float64.
        merged: The same rows of the result, in float64.
    """
    from loratools.algebra.rounding import merge_error_bound

    exact, magnitude = exact_rows(deltas, start, base)
    nearest = output.rounding.mode == "nearest"
    terms = sum(delta.terms for delta in deltas)
    bound = merge_error_bound(abs(base), magnitude, merged, output.dtype, terms, nearest=nearest)
    return largest_share(abs(merged - exact), bound)


def exact_rows(deltas: Sequence[AddedDelta], start: int, base: Floats) -> tuple[Floats, Floats]:
    """Rows of base plus deltas, and what rounding errors of the deltas are proportional to; in the dtype of `base`."""
    import numpy as np

    exact, magnitude = base.copy(), np.zeros_like(base)
    for delta in deltas:
        delta.add_to(exact, start, base)
        delta.add_magnitude_to(magnitude, start, base)
    return exact, magnitude


def largest_share(error: Floats, allowed: Floats) -> float:
    """The largest error as a share of what is allowed there; infinite where that is no number."""
    return float(share_of_allowed(error, allowed).max(initial=0.0))


def share_of_allowed(error: Floats, allowed: Floats) -> Floats:
    """Each error as a share of what is allowed there; infinite where that is no number."""
    import numpy as np

    # Exact is exact, also where the bound is too small to be a number; any other error is then beyond all bounds.
    with np.errstate(divide="ignore"):
        share = np.divide(error, allowed, out=np.zeros_like(error), where=error != 0)
    return np.where(np.isnan(share), math.inf, share)


def require_right(ratios: Mapping[str, float]) -> None:
    """Raise LoraToolsError where a tensor is further from the exact result than rounding explains: a bug of ours."""
    wrong = {name: ratio for name, ratio in ratios.items() if not ratio <= 1}
    if wrong:
        raise LoraToolsError(
            f"the self-check found {len(wrong)} merged weights that are not base + update",
            details=[f"{name}   {ratio:.3g} times the error that rounding explains" for name, ratio in wrong.items()],
            hint="this is a bug of loratools; nothing was written",
        )
