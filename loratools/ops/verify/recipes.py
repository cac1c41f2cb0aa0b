"""The ways in which programs add deltas to a weight: what each rounds, and when.

A recipe is a formula of the base and of each adapter's delta that never falls where a delta rises. Programs that follow
the same recipe add up in different orders, so that their float32 sums differ in the last bits; where such a sum lies
next to the middle between two stored numbers, the stored numbers differ as well. A stored number is therefore explained
where it lies between what the recipe gives with every delta lowered and raised by the error of float32.

    rounded once         round(W + dW_1 + dW_2)
    deltas in a dtype    round(W + round(dW)): a sum in the base's dtype
    factors in a dtype   round(W + round(round(B) round(A))): PEFT with an adapter that is held in that dtype
    scaled afterwards    round(W + round(s round(B A))): a product in the dtype, and its scale after it
    scale in B           round(W + round(round(s B) A)): mlx-lm with an adapter that is held in the dtype
    factors joined       round(W + round(round([B_1 B_2]) round([s_1 A_1; s_2 A_2]))): PEFT's add_weighted_adapter (cat)
    one after the other  round(round(W + dW_1) + dW_2): PEFT's merge_and_unload, adapter by adapter
    task vectors         round(W + round(w_1 round(M_1 - W) + ...)), M_1 = round(W + dW_1): mergekit's sums of models
"""

from __future__ import annotations

import math
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
        delta_dtype: What each delta is rounded to before it is added; None if it stays in float32.
        sequential: Whether the sum is stored, and so rounded, after each delta.
        factor_dtype: What A and B are rounded to before they are multiplied; None if they are not. The deltas that
            `apply` is given are those of such factors.
        scaled_b: Whether B was multiplied with the scale and rounded before the product, in these factors.
        steps: What each product of A and B is multiplied with, number by number, and rounded to `delta_dtype` each
            time, by delta; empty if products are scaled before they are rounded.
        task_dtype: What the differences of models from the base, and their weighted sum, are rounded to; None if deltas
            are added to the base itself.
        weights: With `task_dtype`: the weight of each adapter, which the deltas are given with.
        joined: Whether the only delta is that of the factors of all adapters side by side.
    """

    order: tuple[int, ...]
    delta_dtype: str | None = None
    sequential: bool = False
    factor_dtype: str | None = None
    scaled_b: bool = False
    steps: tuple[tuple[float, ...], ...] = ()
    task_dtype: str | None = None
    weights: tuple[float, ...] = ()
    joined: bool = False

    def __str__(self) -> str:
        delta = f"deltas rounded to {_NAMES[self.delta_dtype]}" if self.delta_dtype else "deltas in float32"
        if self.steps and self.delta_dtype:
            delta = f"products rounded to {_NAMES[self.delta_dtype]}, scaled and rounded again"
        if self.factor_dtype:
            factors = "A and scale times B" if self.scaled_b else "A and B"
            if self.joined:
                factors = "scale times A and B of all adapters joined and"
            delta = f"{factors} rounded to {_NAMES[self.factor_dtype]}, {delta}"
        if self.task_dtype:
            return f"{delta}, models rounded, and the weighted sum of their differences in {_NAMES[self.task_dtype]}"
        if not self.sequential:
            return f"{delta}, the sum rounded once"
        order = ", ".join(str(i + 1) for i in self.order)
        return f"{delta}, adapters one after the other ({order}), each sum rounded"

    def programs(self, stored: str) -> tuple[str, ...]:
        """The programs that are known to merge in this way into weights of the dtype `stored`."""
        several = len(self.order) > 1
        if self.task_dtype is not None:
            return ("mergekit (task_arithmetic of models that PEFT merged)",)
        if self.joined:
            return ("PEFT (add_weighted_adapter with 'cat', then merged)",)
        if self.scaled_b:
            return ("mlx-lm fuse with an adapter in that dtype",)
        if self.steps:
            return (
                "PEFT on a GPU with an adapter in that dtype",
                "LyCORIS into a model in that dtype",
                "sd-scripts with --precision of that dtype",
            )
        if self.factor_dtype is not None and self.delta_dtype is not None:
            return ("PEFT on a CPU with an adapter in that dtype",)
        if self.delta_dtype is not None:
            one_dtype = self.delta_dtype == stored
            return ("mlx-lm fuse", "PEFT with safe_merge", "a sum in the dtype of the base") if one_dtype else ()
        if self.factor_dtype is not None:
            return ("loratools, or another program, with a copy of the adapter in that dtype",)
        once = ("loratools", "ComfyUI")
        if self.sequential:
            return ("PEFT (merge_and_unload, adapter by adapter)", "LLaMA-Factory")
        return once if several else (*once, "PEFT with an adapter in float32", "LyCORIS and sd-scripts in float32")

    def apply(self, base: Floats, deltas: Sequence[Floats], stored: str) -> Floats:
        """What the recipe stores, as values in the dtype of `base`.

        Args:
            base: Values of the base, of any shape, in float32 or float64.
            deltas: The delta of each adapter, in the same shape and dtype.
            stored: The dtype that the result is stored in.
        """
        if self.task_dtype is not None:
            return self._sum_of_differences(base, deltas, stored, self.task_dtype)
        rounded = [self._rounded(i, deltas[i]) for i in self.order]
        if self.sequential:
            total = base
            for delta in rounded:
                total = round_to(total + delta, stored)
            return total
        total = base + rounded[0]
        for delta in rounded[1:]:
            total = total + delta
        return round_to(total, stored)

    def _rounded(self, i: int, delta: Floats) -> Floats:
        """The delta of an adapter as it is added."""
        if self.delta_dtype is None:
            return delta
        if not self.steps:
            return round_to(delta, self.delta_dtype)
        product = round_to(delta / delta.dtype.type(math.prod(self.steps[i])), self.delta_dtype)
        for step in self.steps[i]:
            product = round_to(product * product.dtype.type(step), self.delta_dtype)
        return product

    def _sum_of_differences(self, base: Floats, deltas: Sequence[Floats], stored: str, dtype: str) -> Floats:
        """Models that are base and one delta each, less the base, each times its weight, added to the base."""
        total = 0 * base
        for delta, weight in zip(deltas, self.weights, strict=True):
            single = delta.dtype.type
            model = round_to(base + delta / single(weight), stored)
            # A weight is a number of that dtype as well.
            factor = round_to(delta.dtype.type(weight).reshape(1), dtype)
            total = total + round_to(factor * round_to(model - base, dtype), dtype)
        return round_to(round_to(base + round_to(total, dtype), dtype), stored)


def known_recipes(adapters: int, stored: str, factor_dtype: str | None = None) -> tuple[Recipe, ...]:
    """The recipes for this number of adapters and this dtype of the result, the most common first.

    factor_dtype: what A and B were rounded to, in the deltas that the recipes will be given.
    """
    given_order = tuple(range(adapters))
    dtypes = (None, *sorted({"BF16", "F16"} - {stored}), *({stored} & {"BF16", "F16"}))
    recipes = [Recipe(given_order, dtype, factor_dtype=factor_dtype) for dtype in dtypes]
    if adapters > 1:
        orders = list(permutations(given_order)) if adapters <= _FEW else [given_order, given_order[::-1]]
        recipes += [Recipe(order, dtype, True, factor_dtype) for order in orders for dtype in dtypes]
    return tuple(recipes)


def scaling_recipes(
    scales: Sequence[float], weights: Sequence[float], factor_dtype: str | None = None
) -> tuple[Recipe, ...]:
    """Recipes of products that are rounded before they are scaled, for adapters of these scales and weights."""
    given_order = tuple(range(len(scales)))
    orders = (
        tuple((scale * weight,) for scale, weight in zip(scales, weights, strict=True)),
        tuple((scale, weight) for scale, weight in zip(scales, weights, strict=True)),
        tuple((weight, scale) for scale, weight in zip(scales, weights, strict=True)),
    )
    if any(step == 0 for order in orders for steps in order for step in steps):
        return ()
    distinct = orders if any(weight != 1 for weight in weights) else orders[:1]
    return tuple(
        Recipe(given_order, dtype, False, factor_dtype, steps=steps)
        for dtype in ([factor_dtype] if factor_dtype else ["BF16", "F16"])
        for steps in distinct
    )


def task_recipes(weights: Sequence[float], stored: str) -> tuple[Recipe, ...]:
    """Recipes of sums of models, for adapters of these weights and models of the dtype `stored`."""
    if any(weight == 0 for weight in weights):
        return ()
    given_order = tuple(range(len(weights)))
    dtypes = dict.fromkeys((stored, "F32"))
    return tuple(Recipe(given_order, None, task_dtype=dtype, weights=tuple(weights)) for dtype in dtypes)


def dtype_name(dtype: str) -> str:
    """What a dtype is called in sentences."""
    return _NAMES[dtype]


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
