"""Numbers in the places of a heat map: short, and spelled alike, so that one is compared with another at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[float | None]], limits: tuple[float, float]) -> list[list[str]]:
    """Return the numbers with as many decimals as their scale asks for; empty if there is none.

    Args:
        rows: The numbers; None or NaN for a missing one.
        limits: The ends of their scale.

    Example:
        >>> aligned([[0.5, -0.0012], [None, 1.0]], (-1.0, 1.0)), aligned([[3.0, 12.0]], (0.0, 12.0))
        ([['0.50', '0.00'], ['', '1.00']], [['3', '12']])
    """
    present = [value for row in rows for value in row if value is not None and not math.isnan(value)]
    reach = max(abs(limits[0]), abs(limits[1]))
    if all(value == int(value) for value in present) and reach < 1e4:
        form = ".0f"
    elif reach < 0.1 or reach >= 1e4:
        form = ".0e"
    else:
        form = ".2f" if reach < 10 else ".1f" if reach < 100 else ".0f"
    return [["" if value is None or math.isnan(value) else _spelled(value, form) for value in row] for row in rows]


def _spelled(value: float, form: str) -> str:
    # Zero is exact in every form; "0e+00" reads like a very small number.
    text = "0" if not value and form.endswith("e") else format(value, form)
    # What rounds to zero has no sign.
    return text.lstrip("-") if not text.strip("-0.") else text
