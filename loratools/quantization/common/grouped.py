"""Integers with a scale, and optionally a zero point, for each group of consecutive values of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.algebra.packing import Integers
    from loratools.algebra.rounding import Floats


def over_groups(per_group: Floats, columns: int, order: Integers | None = None) -> Floats:
    """Expand one number per group to one per column: (rows, groups) -> (rows, columns).

    Args:
        per_group: One number for each row and group.
        columns: The number of columns; the last group may be shorter.
        order: The group of each column, if columns were quantised in another order.
    """
    import numpy as np

    if order is not None:
        return per_group[:, order]
    groups = per_group.shape[1]
    if groups == 1:
        return per_group
    return np.repeat(per_group, -(-columns // groups), axis=1)[:, :columns]


def scaled(codes: Integers, scales: Floats, zeros: Floats | None, dtype: str, order: Integers | None = None) -> Floats:
    """Return `(codes - zeros) * scales` as float32, (rows, columns), rounded once to `dtype`.

    Codes and zero points are integers of at most 8 bits, so that every dtype holds their difference exactly and only
    the product rounds.
    """
    import numpy as np

    from loratools.algebra.packing import onto_grid

    values: Floats = codes.astype(np.float32)
    if zeros is not None:
        values -= over_groups(zeros, values.shape[1], order)
    values *= over_groups(scales, values.shape[1], order)
    return onto_grid(values, dtype)
