"""One pass over an adapted weight: which recipes explain its values, and what each delta is multiplied with in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rows import AddedDelta, compute_dtype, prepared, read_rows, total_delta
from loratools.ops.merge.verify import rows_error_ratio
from loratools.ops.verify.fit import Fit, Sums
from loratools.ops.verify.recipes import Recipe, known_recipes, scaling_recipes, task_recipes
from loratools.storage.arrays import read_array
from loratools.storage.files import reading
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loratools.algebra.rounding import Floats

# As of a merge: base, deltas, sum and result of a block stay in one core's cache.
_BLOCK_ELEMENTS = 48 << 10
_FEW = 16
_MEASURED = 4
# Rows whose error against float64 is measured: so many at the start, in the middle and at the end.
_ROWS = 3


@dataclass(frozen=True)
class Measured:
    """What one pass over a weight told.

    Attributes:
        recipe: The first recipe that explains every value that was looked at; None where there is none.
        fit: Sums for the best-fit weights. Where the usual recipe explains the values, in float32 and over a sample of
            the blocks; elsewhere in float64 and over all that were looked at.
        max_error_ratio: The largest error of some rows against float64, as a share of what one rounding allows; None
            where it was not measured.
    """

    recipe: Recipe | None
    fit: Fit
    max_error_ratio: float | None


class Deltas:
    """The deltas of one weight, one for each adapter that changes it."""

    def __init__(self, output: Output, dtype: str | None = None) -> None:
        self.adapters = tuple(dict.fromkeys(sorted(update.adapter for update in output.updates)))
        self.output = output
        self.dtype = dtype or compute_dtype(output)
        self._added = [prepared(self._of(adapter), self.dtype, 0, output.rows) for adapter in self.adapters]

    def _of(self, adapter: int) -> Output:
        return replace(self.output, updates=tuple(u for u in self.output.updates if u.adapter == adapter))

    @property
    def of_one_adapter(self) -> Sequence[AddedDelta] | None:
        """What is added of the only adapter; None where there are several."""
        return self._added[0] if len(self._added) == 1 else None

    @property
    def terms(self) -> int:
        """Products summed in one entry, over all adapters."""
        return sum(delta.terms for group in self._added for delta in group)

    def rows(self, start: int, stop: int, base: Floats) -> list[Floats]:
        """Rows start:stop of each delta, (stop - start, columns)."""
        return [_rows(group, start, base) for group in self._added]

    def magnitude(self, start: int, base: Floats) -> Floats:
        """What rounding errors of these rows are proportional to, over all adapters."""
        import numpy as np

        total = np.zeros_like(base)
        for delta in (p for group in self._added for p in group):
            delta.add_magnitude_to(total, start, base)
        return total


def _rows(group: Sequence[AddedDelta], start: int, base: Floats) -> Floats:
    import numpy as np

    if len(group) == 1 and group[0].everywhere:
        return group[0].delta.rows(start, start + len(base), base)
    total = np.zeros_like(base)
    for delta in group:
        delta.add_to(total, start, base)
    return total


def with_factors_in(output: Output, dtype: str, *, scaled_b: bool = False) -> Output | None:
    """The output with all A and B rounded to `dtype`; None where an update is no LoRA, or none would change.

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


def blocks(output: Output, sample: float = 1.0) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together are the share `sample` of all, spread evenly; at least one."""
    step = max(1, _BLOCK_ELEMENTS // max(1, output.columns))
    starts = range(0, output.rows, step)
    every = max(1, round(1 / sample))
    for start in starts[::every]:
        yield start, min(start + step, output.rows)


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
    usual, *others = known_recipes(len(deltas.adapters), output.dtype)
    recipe: Recipe | None = usual
    sums = Sums(len(deltas.adapters))
    with np.errstate(over="ignore", invalid="ignore"):
        by_bits = deltas.of_one_adapter is not None and stored.location is not None and not output.patches
        if by_bits and output.values.location is not None:
            explained = _explained_by_bits(usual, output, stored, deltas, sample, sums)
        else:
            explained = _explained_by_values(usual, output, stored, deltas, sample, sums)
        looked_at = sum((stop - start) * output.columns for start, stop in blocks(output, sample))
        if not explained:
            recipe = None
            # Further passes, for the few weights that are not as most programs merge.
            recipe = _other_recipe(others, output, stored, deltas, sample)
            # What is left after a best fit is a small difference of large sums.
            sums = Sums(len(deltas.adapters))
            for _, base, parts, values in _read(output, stored, Deltas(output, "F64"), sample):
                sums.add(base, parts, values)
            looked_at = sums.count
    return Measured(recipe, sums.fit(looked_at), _error_ratio(output, stored))


def _summed(output: Output, sample: float) -> int:
    """Of a weight of more than a few blocks, every fourth is summed up: enough for its gain."""
    return _MEASURED if len(list(blocks(output, sample))) > _FEW else 1


def _explained_by_values(
    usual: Recipe, output: Output, stored: LazyTensor, deltas: Deltas, sample: float, sums: Sums
) -> bool:
    """Whether the usual recipe explains every block; what is needed for the fit is added to `sums`."""
    every = _summed(output, sample)
    for i, (start, base, parts, values) in enumerate(_read(output, stored, deltas, sample)):
        if not _explains(usual, deltas, start, base, parts, values):
            return False
        if i % every == 0:
            sums.add(base, parts, values)
    return True


def _explained_by_bits(
    usual: Recipe, output: Output, stored: LazyTensor, deltas: Deltas, sample: float, sums: Sums
) -> bool:
    """The same for one adapter and weights that lie in files: a block is merged again, and its stored bits compared.

    Memory is reused from block to block, and the merged values are only looked at where bits differ, or for `sums`.
    """
    import numpy as np

    from loratools.algebra.rounding import STORAGE, narrow, widen

    base_place, merged_place, only_deltas = output.values.location, stored.location, deltas.of_one_adapter
    assert base_place is not None, "asked before"
    assert merged_place is not None, "asked before"
    assert only_deltas is not None, "asked before"
    every, ranges = _summed(output, sample), list(blocks(output, sample))
    shape = (max((stop - start for start, stop in ranges), default=0), output.columns)
    single = STORAGE[deltas.dtype]
    read_from, read_merged = np.empty(shape, STORAGE[output.values.dtype]), np.empty(shape, STORAGE[output.dtype])
    bases, parts, sums_of, values_of = (np.empty(shape, single) for _ in range(4))
    written = np.empty_like(read_merged)
    bits = np.dtype(f"u{written.itemsize}")
    with reading(base_place) as read_base_bytes, reading(merged_place) as read_merged_bytes:
        for i, (start, stop) in enumerate(ranges):
            rows = slice(0, stop - start)
            raw, base, part = read_from[rows], bases[rows], parts[rows]
            merged, exact, values = read_merged[rows], sums_of[rows], values_of[rows]
            read_base_bytes(start * raw[0].nbytes, raw.reshape(-1).view(np.uint8).data)
            read_merged_bytes(start * merged[0].nbytes, merged.reshape(-1).view(np.uint8).data)
            widen(raw, output.values.dtype, base)
            total_delta(only_deltas, start, base, part)
            np.add(base, part, out=exact)
            finite = float(np.vdot(exact, exact)) < float("inf")
            narrow(exact, output.dtype, written[rows], rounded=values, keep_nan=not finite)
            equal = np.array_equal(written[rows].view(bits), merged.view(bits))
            if not equal or i % every == 0:
                widen(merged, output.dtype, values)
            if not equal:
                wrong = np.flatnonzero(written[rows].view(bits) != merged.view(bits))
                if not _is_explained(usual, deltas, start, base, [part], values, wrong):
                    return False
            if i % every == 0:
                sums.add(base, [part], values)
    return True


def _other_recipe(
    others: Sequence[Recipe], output: Output, stored: LazyTensor, deltas: Deltas, sample: float
) -> Recipe | None:
    """The first recipe but the usual that explains every value; None where none does."""
    adapters = len(deltas.adapters)
    scalings = _scales_and_weights(output, deltas.adapters)
    recipes = list(others)
    if scalings is not None:
        scales, weights = scalings
        recipes += scaling_recipes(scales, weights)
    recipes += task_recipes(_weights(output, deltas.adapters), output.dtype)
    if (recipe := _first_that_explains(recipes, output, stored, deltas, sample)) is not None:
        return recipe
    for dtype in ("BF16", "F16"):
        for scaled_b in (False, True):
            rounded = with_factors_in(output, dtype, scaled_b=scaled_b)
            if rounded is None:
                continue
            recipes = list(known_recipes(adapters, output.dtype, dtype))
            if scaled_b:
                recipes = [replace(recipe, scaled_b=True) for recipe in recipes]
            elif scalings is not None:
                recipes += scaling_recipes(*scalings, dtype)
            if (recipe := _first_that_explains(recipes, rounded, stored, Deltas(rounded), sample)) is not None:
                return recipe
    return None


def _scales_and_weights(output: Output, adapters: Sequence[int]) -> tuple[list[float], list[float]] | None:
    """Scale and weight of each adapter's updates; None where a delta is no scaled product, or its scales differ."""
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


def _first_that_explains(
    recipes: Sequence[Recipe], output: Output, stored: LazyTensor, deltas: Deltas, sample: float
) -> Recipe | None:
    """The first of the recipes that explains every block, found in one pass over all of them."""
    candidates = list(recipes)
    for start, base, parts, values in _read(output, stored, deltas, sample):
        candidates = [recipe for recipe in candidates if _explains(recipe, deltas, start, base, parts, values)]
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
            if not _explains(usual, deltas, start, base, scaled, values):
                return False
    return True


def _explains(
    recipe: Recipe, deltas: Deltas, start: int, base: Floats, parts: Sequence[Floats], values: Floats
) -> bool:
    """Whether a recipe explains every value of a block."""
    import numpy as np

    wrong = np.flatnonzero(recipe.apply(base, parts, deltas.output.dtype) != values)
    return not wrong.size or _is_explained(recipe, deltas, start, base, parts, values, wrong)


def _is_explained(
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
    unexplained = _outside(recipe, w, d, m, unit * size, deltas.output.dtype)
    if not unexplained.any():
        return True
    if unexplained.mean() > 0.5 and unexplained.size > 64:
        # Most of many values are wrong: a bound for terms that cancel would not change that.
        return False
    rows = wrong[unexplained] // base.shape[1]
    columns = wrong[unexplained] % base.shape[1]
    for row in np.unique(rows):
        in_row = rows == row
        magnitude = deltas.magnitude(start + int(row), base[row : row + 1]).reshape(-1)[columns[in_row]]
        chosen = np.flatnonzero(unexplained)[in_row]
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


def _error_ratio(output: Output, stored: LazyTensor) -> float:
    """The largest error of some rows against float64, as a share of `merge_error_bound`."""
    rows = min(_ROWS, output.rows)
    last = output.rows - rows
    deltas = prepared(output, "F64", 0, output.rows)
    worst = 0.0
    for start in sorted({0, last // 2, last}):
        base = read_rows(output, "F64", start, start + rows)
        values = read_array(stored, "F64", start, start + rows)
        worst = max(worst, rows_error_ratio(output, deltas, start, base, values))
    return worst
