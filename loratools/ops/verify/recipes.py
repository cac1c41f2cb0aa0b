"""The ways in which programs add deltas to a weight: what each rounds, and when.

A recipe is a formula of the base and of each adapter's delta that never falls where a delta rises. Programs that follow
the same recipe add up in different orders, so that their float32 sums differ in the last bits; where such a sum lies
next to the middle between two stored numbers, the stored numbers differ as well. A stored number is therefore explained
where it lies between what the recipe gives with every delta lowered and raised by the error of float32.

    rounded once         round(W + dW_1 + dW_2)
    deltas in a dtype    round(W + round(dW)): a sum in the base's dtype
    factors in a dtype   round(W + round(round(B) round(A))): PEFT with an adapter that is held in that dtype
    one after the other  round(round(W + dW_1) + dW_2): PEFT's merge_and_unload, adapter by adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# Of more adapters than this only the given order and its reverse are tried.
_FEW = 3


@dataclass(frozen=True)
class Recipe:
    """One way of adding deltas to a weight.

    Attributes:
        order: The deltas, by their numbers, in the order in which they are added.
        delta_dtype: What each delta is rounded to before it is added; None where it stays in float32.
        sequential: Whether the sum is stored, and so rounded, after each delta.
        factor_dtype: What A and B are rounded to before they are multiplied; None where they are not. The deltas that
            `apply` is given are those of such factors.
    """

    order: tuple[int, ...]
    delta_dtype: str | None = None
    sequential: bool = False
    factor_dtype: str | None = None

    def __str__(self) -> str:
        delta = f"deltas rounded to {_NAMES[self.delta_dtype]}" if self.delta_dtype else "deltas in float32"
        delta = f"A and B rounded to {_NAMES[self.factor_dtype]}, {delta}" if self.factor_dtype else delta
        if not self.sequential:
            return f"{delta}, the sum rounded once"
        order = ", ".join(str(i + 1) for i in self.order)
        return f"{delta}, adapters one after the other ({order}), each sum rounded"

    def apply(self, base: Floats, deltas: Sequence[Floats], stored: str) -> Floats:
        """What the recipe stores, as values in the dtype of `base`.

        Args:
            base: Values of the base, of any shape, in float32 or float64.
            deltas: The delta of each adapter, in the same shape and dtype.
            stored: The dtype that the result is stored in.
        """
        rounded = [deltas[i] if self.delta_dtype is None else round_to(deltas[i], self.delta_dtype) for i in self.order]
        if self.sequential:
            total = base
            for delta in rounded:
                total = round_to(total + delta, stored)
            return total
        total = base + rounded[0]
        for delta in rounded[1:]:
            total = total + delta
        return round_to(total, stored)


def known_recipes(adapters: int, stored: str, factor_dtype: str | None = None) -> tuple[Recipe, ...]:
    """The recipes for so many adapters and a result of that dtype, the usual first.

    factor_dtype: what A and B were rounded to, in the deltas that the recipes will be given.
    """
    given = tuple(range(adapters))
    dtypes = (None, *sorted({"BF16", "F16"} - {stored}), *({stored} & {"BF16", "F16"}))
    recipes = [Recipe(given, dtype, factor_dtype=factor_dtype) for dtype in dtypes]
    if adapters > 1:
        orders = list(permutations(given)) if adapters <= _FEW else [given, given[::-1]]
        recipes += [Recipe(order, dtype, True, factor_dtype) for order in orders for dtype in dtypes]
    return tuple(recipes)


def round_to(values: Floats, dtype: str) -> Floats:
    """The values rounded to numbers of `dtype`, to nearest, ties to even; in the dtype of `values`."""
    import numpy as np

    from loratools.algebra.rounding import STORAGE, narrow

    if (dtype == "F32" and values.dtype == np.float32) or dtype == "F64":
        return values
    stored = np.empty(values.shape, STORAGE[dtype])
    rounded = np.empty_like(values)
    narrow(np.ascontiguousarray(values), dtype, stored, rounded=rounded)
    return rounded
