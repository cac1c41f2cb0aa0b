"""Whether a recipe explains the values of a block: exactly, or up to the order in which float32 sums are added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.ops.verify.deltas import Deltas
from loratools.ops.verify.recipes import Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loratools.algebra.rounding import Floats


def explains(recipe: Recipe, deltas: Deltas, start: int, base: Floats, parts: Sequence[Floats], values: Floats) -> bool:
    """Whether a recipe explains every value of a block.

    Args:
        recipe: The recipe.
        deltas: The deltas of the weight.
        start: The first row of the block.
        base: The rows of the base, (rows, columns).
        parts: The same rows of each delta.
        values: The same rows of the merged model, in the dtype of the base.
    """
    import numpy as np

    wrong = np.flatnonzero(recipe.apply(base, parts, deltas.output.dtype) != values)
    return not wrong.size or explains_at(recipe, deltas, start, base, parts, values, wrong)


def explains_at(
    recipe: Recipe,
    deltas: Deltas,
    start: int,
    base: Floats,
    parts: Sequence[Floats],
    values: Floats,
    wrong: NDArray[np.intp],
) -> bool:
    """Whether the values at the places `wrong` differ from the recipe's by what the order of float32 sums explains."""
    import numpy as np

    from loratools.algebra.rounding import gamma, unit_roundoff

    # The error of our own sum and that of the program that merged.
    unit = 2 * gamma(deltas.terms + 2, unit_roundoff(deltas.dtype))
    w, m = base.reshape(-1)[wrong].astype(np.float64), values.reshape(-1)[wrong]
    d = [part.reshape(-1)[wrong].astype(np.float64) for part in parts]
    size = abs(w) + sum(map(abs, d))
    unexplained = np.flatnonzero(_outside(recipe, w, d, m, unit * size, deltas.output.dtype))
    if not unexplained.size:
        return True
    # Where terms of a product cancel, its error is larger than that: row by row, as one row that is wrong is enough.
    rows, columns = np.divmod(wrong[unexplained], base.shape[1])
    for row in np.unique(rows):
        in_row = rows == row
        magnitude = deltas.magnitude(start + int(row), base[row : row + 1]).reshape(-1)[columns[in_row]]
        chosen = unexplained[in_row]
        slack = unit * (abs(w[chosen]) + magnitude)
        if _outside(recipe, w[chosen], [x[chosen] for x in d], m[chosen], slack, deltas.output.dtype).any():
            return False
    return True


def _outside(
    recipe: Recipe, base: Floats, parts: Sequence[Floats], values: Floats, slack: Floats, dtype: str
) -> NDArray[np.bool_]:
    """Which values lie outside what the recipe gives with every delta lowered and raised by `slack`."""
    low = recipe.apply(base, [part - slack for part in parts], dtype)
    high = recipe.apply(base, [part + slack for part in parts], dtype)
    outside: NDArray[np.bool_] = ~((low <= values) & (values <= high))
    return outside
