"""One pass over an adapted weight: which recipes explain its values, and what each delta is multiplied with in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rows import prepared, read_rows
from loratools.ops.merge.verify import rows_error_ratio
from loratools.ops.verify.deltas import Deltas, blocks
from loratools.ops.verify.explanation import explains
from loratools.ops.verify.fit import Fit, Sums
from loratools.ops.verify.merged_again import is_merged_again
from loratools.ops.verify.other_factors import joined_in
from loratools.ops.verify.recipes import Recipe, known_recipes, scaling_recipes, task_recipes
from loratools.ops.verify.stepped import SteppedRecipe, stepped_recipe
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

AnyRecipe = Recipe | SteppedRecipe


@dataclass(frozen=True)
class Measured:
    """What one pass over a weight told.

    Attributes:
        recipe: The first recipe that explains every value that was looked at; None if there is none.
        fit: Sums for the best-fit weights. Where the usual recipe explains the values, in float32 and over a sample of
            the blocks; elsewhere in float64 and over all that were looked at.
        max_error_ratio: The largest error of some rows against float64, as a share of what one rounding allows; None if
            it was not measured.
    """

    recipe: AnyRecipe | None
    fit: Fit
    max_error_ratio: float | None


def with_factors_in(output: Output, dtype: str, *, scaled_b: bool = False) -> Output | None:
    """The output with all A and B rounded to `dtype`; None if an update is no LoRA, or none would change.

    With `scaled_b`, B is multiplied with the scale before it is rounded once more, and divided by it afterwards.
    """
    import torch

    from loratools.tensors.dtypes import torch_dtype
    from loratools.tensors.lazy import from_torch

    def rounded(tensor: LazyTensor) -> LazyTensor:
        return from_torch(tensor.read().to(torch_dtype(dtype)))

    def scaled(b: LazyTensor, scale: float) -> LazyTensor:
        # The scale is a number of that dtype as well.
        product = b.read().to(torch_dtype(dtype)) * torch.tensor(scale, dtype=torch_dtype(dtype))
        return from_torch((product.double() / scale).to(torch.float64))

    loras = [(u, u.update.as_lora()) for u in output.updates]
    if any(lora is None or (lora.magnitude is not None and scaled_b) for _, lora in loras):
        return None
    if scaled_b and any(lora is not None and lora.scale == 0 for _, lora in loras):
        return None
    if not scaled_b and all(lora and lora.a.dtype == dtype for _, lora in loras):
        return None
    updates = [
        replace(
            u, update=replace(lora, a=rounded(lora.a), b=scaled(lora.b, lora.scale) if scaled_b else rounded(lora.b))
        )
        for u, lora in loras
        if lora
    ]
    return replace(output, updates=tuple(updates))


def measure(output: Output, merged: LazyTensor, *, sample: float = 1.0) -> Measured:
    """Compare a weight of the merged model with what the plan of a merge says of it.

    Args:
        output: What the weight should be, in the dtype that it is stored in.
        merged: The weight of the merged model, of the same shape.
        sample: The share of the rows to look at.
    """
    import numpy as np

    deltas = Deltas(output)
    stored = reshaped(merged, output.matrix)
    usual = known_recipes(len(deltas.adapters), output.dtype)[0]
    recipe: AnyRecipe | None = usual
    sums = Sums(len(deltas.adapters))
    with np.errstate(over="ignore", invalid="ignore"):
        explained = is_merged_again(usual, output, stored, deltas, sample, sums)
        looked_at = sum((stop - start) * output.columns for start, stop in blocks(output, sample))
        if not explained:
            # Further passes, for the few weights that are not as most programs merge.
            recipe = _other_recipe(output, stored, sample)
            # What is left after a best fit is a small difference of large sums.
            sums = Sums(len(deltas.adapters))
            for _, base, parts, values in _read(output, stored, Deltas(output, "F64"), sample):
                sums.add(base, parts, values)
            looked_at = sums.count
    return Measured(recipe, sums.fit(looked_at), _error_ratio(output, stored))


def recipe_of(programs: Collection[str], output: Output, merged: LazyTensor, *, sample: float) -> AnyRecipe | None:
    """The first recipe of one of these programs that explains every value; None if none does.

    Args:
        programs: The programs, as `Recipe.programs` names them.
        output: What the weight should be, in the dtype that it is stored in.
        merged: The weight of the merged model, of the same shape.
        sample: The share of the rows to look at.
    """
    import numpy as np

    stored = reshaped(merged, output.matrix)
    with np.errstate(over="ignore", invalid="ignore"):
        for computed, recipes in _recipes(output):
            chosen = [recipe for recipe in recipes if set(recipe.programs(output.dtype)) & set(programs)]
            if chosen and (recipe := _first_that_explains(chosen, computed, stored, sample)) is not None:
                return recipe
        stepped = stepped_recipe(output, stored, sample)
    return stepped if stepped is not None and set(stepped.programs(output.dtype)) & set(programs) else None


def _other_recipe(output: Output, stored: LazyTensor, sample: float) -> AnyRecipe | None:
    """The first recipe but the usual that explains every value; None if none does."""
    usual = known_recipes(len({update.adapter for update in output.updates}), output.dtype)[0]
    for computed, recipes in _recipes(output):
        others = [recipe for recipe in recipes if recipe != usual]
        if (recipe := _first_that_explains(others, computed, stored, sample)) is not None:
            return recipe
    return stepped_recipe(output, stored, sample)


def _recipes(output: Output) -> Iterator[tuple[Output, list[Recipe]]]:
    """All recipes, the usual first, with the output that has the factors that they are given the deltas of."""
    adapters = tuple(dict.fromkeys(sorted(update.adapter for update in output.updates)))
    scalings = _scales_and_weights(output, adapters)
    recipes = list(known_recipes(len(adapters), output.dtype))
    if scalings is not None:
        recipes += scaling_recipes(*scalings)
    recipes += task_recipes(_weights(output, adapters), output.dtype)
    yield output, recipes
    for dtype in ("BF16", "F16"):
        for scaled_b in (False, True):
            rounded = with_factors_in(output, dtype, scaled_b=scaled_b)
            if rounded is None:
                continue
            recipes = list(known_recipes(len(adapters), output.dtype, dtype))
            if scaled_b:
                recipes = [replace(recipe, scaled_b=True) for recipe in recipes]
            elif scalings is not None:
                recipes += scaling_recipes(*scalings, dtype)
            yield rounded, recipes
    if len(adapters) > 1 and output.dtype in ("BF16", "F16"):
        joined = joined_in(output, output.dtype)
        if joined is not None:
            yield joined, [Recipe((0,), output.dtype, factor_dtype=output.dtype, joined=True)]


def _scales_and_weights(output: Output, adapters: Sequence[int]) -> tuple[list[float], list[float]] | None:
    """Scale and weight of each adapter's updates; None if a delta is no scaled product, or its scales differ."""
    pairs: dict[int, set[tuple[float, float]]] = {adapter: set() for adapter in adapters}
    for weighted in output.updates:
        lora = weighted.update.as_lora()
        if lora is None or lora.magnitude is not None:
            return None
        pairs[weighted.adapter].add((lora.scale, weighted.weight))
    if any(len(of_adapter) != 1 for of_adapter in pairs.values()):
        return None
    chosen = [next(iter(pairs[adapter])) for adapter in adapters]
    return [scale for scale, _ in chosen], [weight for _, weight in chosen]


def _weights(output: Output, adapters: Sequence[int]) -> list[float]:
    """The weight of each adapter."""
    weight_of = {weighted.adapter: weighted.weight for weighted in output.updates}
    return [weight_of[adapter] for adapter in adapters]


def _read(
    output: Output, stored: LazyTensor, deltas: Deltas, sample: float
) -> Iterator[tuple[int, Floats, list[Floats], Floats]]:
    """First row, base, deltas and merged values of each block that is looked at."""
    for start, stop in blocks(output, sample):
        base = read_rows(output, deltas.dtype, start, stop)
        yield start, base, deltas.rows(start, stop, base), read_array(stored, deltas.dtype, start, stop)


def _first_that_explains(recipes: Sequence[Recipe], output: Output, stored: LazyTensor, sample: float) -> Recipe | None:
    """The first of the recipes that explains every block, found in one pass over all of them."""
    candidates, deltas = list(recipes), Deltas(output)
    for start, base, parts, values in _read(output, stored, deltas, sample):
        candidates = [recipe for recipe in candidates if explains(recipe, deltas, start, base, parts, values)]
        if not candidates:
            return None
    return candidates[0] if candidates else None


def explained_with(output: Output, merged: LazyTensor, times: Sequence[float], sample: float = 1.0) -> bool:
    """Whether the usual recipe gives every value where each delta is multiplied with its number of `times`."""
    import numpy as np

    deltas, stored = Deltas(output), reshaped(merged, output.matrix)
    usual = known_recipes(len(deltas.adapters), output.dtype)[0]
    with np.errstate(over="ignore", invalid="ignore"):
        for start, base, parts, values in _read(output, stored, deltas, sample):
            scaled = [share * part for share, part in zip(times, parts, strict=True)]
            if not explains(usual, deltas, start, base, scaled, values):
                return False
    return True


def _error_ratio(output: Output, stored: LazyTensor) -> float:
    """The largest error of three rows against float64, as a share of `merge_error_bound`."""
    deltas = prepared(output, "F64", 0, output.rows)
    worst = 0.0
    for row in sorted({0, (output.rows - 1) // 2, output.rows - 1}):
        base = read_rows(output, "F64", row, row + 1)
        values = read_array(stored, "F64", row, row + 1)
        worst = max(worst, rows_error_ratio(output, deltas, row, base, values))
    return worst
