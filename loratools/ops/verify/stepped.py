"""Merges in which every step is rounded to the dtype of the base: LoHa and LoKr by LyCORIS, DoRA by PEFT.

The deltas of these kinds are no single product, so that what a program rounds on the way to them tells in the result:

    LoHa    round(W + round(w round(s round(round(W1a W1b) o round(W2a W2b)))))
    LoKr    round(W + round(w round(s round(kron(W1, W2))))), with a factored W1 or W2 multiplied and rounded before
    DoRA    round(f V), V = round(W + round(s B A)), f = round(m / round(|V|)), with a norm for each output

Factors, s of LoHa and m are rounded to the dtype first. The sums in a product and in a norm are float32, in an order
that is not known. A stored number is explained where it lies between what the steps give with these sums lowered and
raised by the error of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Protocol, cast

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rows import read_rows
from loratools.ops.verify.deltas import blocks
from loratools.ops.verify.recipes import dtype_name, round_to
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.loha import LoHa
from loratools.updates.lokr import LoKr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loratools.algebra.rounding import Floats

_DTYPES = ("BF16", "F16")
# Roundings of float32 beside those of a sum: of the scale, of its product, and of a square root.
_MORE_TERMS = 4


@dataclass(frozen=True)
class SteppedRecipe:
    """A way of merging one delta in which every step is rounded to the dtype that is stored.

    Attributes:
        kind: The kind of the update: `loha`, `lokr`, or `dora` for a LoRA with a magnitude.
        dtype: What factors, and the result of every step, are rounded to.
    """

    kind: str
    dtype: str

    def __str__(self) -> str:
        dtype = dtype_name(self.dtype)
        if self.kind == "dora":
            return f"A, B and magnitude rounded to {dtype}, then delta, norm, factor and sum rounded to it step by step"
        return f"factors rounded to {dtype}, then products, scale and sum rounded to it step by step"

    def programs(self, stored: str) -> tuple[str, ...]:
        """The programs that are known to merge in this way into weights of the dtype `stored`."""
        if stored != self.dtype:
            return ()
        if self.kind == "dora":
            return ("PEFT on a CPU with an adapter in that dtype",)
        return ("LyCORIS into a model in that dtype",)


class _Steps(Protocol):
    """The steps of one merge, with all of its factors read."""

    def explains(self, start: int, base: Floats, values: Floats) -> bool:
        """Whether they give every value of rows from `start` on: `base` and `values` are (rows, columns), float32."""


def stepped_recipe(output: Output, stored: LazyTensor, sample: float) -> SteppedRecipe | None:
    """The recipe of steps that explains every value of a weight that is looked at; None if none does.

    Args:
        output: What the weight should be, in the dtype that it is stored in.
        stored: The weight of the merged model, as a matrix.
        sample: The share of the rows to look at.
    """
    kind, steps = _steps(output, scalings=1)
    return SteppedRecipe(kind, output.dtype) if steps and _explains(steps, output, stored, sample) else None


def scaled_twice_in_steps(output: Output, stored: LazyTensor, sample: float) -> bool:
    """Whether the steps explain every value with a scale that is applied once more, as LyCORIS 4.1 does."""
    kind, steps = _steps(output, scalings=2)
    return kind != "dora" and steps is not None and _explains(steps, output, stored, sample)


def _explains(steps: _Steps, output: Output, stored: LazyTensor, sample: float) -> bool:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return all(
            steps.explains(start, read_rows(output, "F32", start, stop), read_array(stored, "F32", start, stop))
            for start, stop in blocks(output, sample)
        )


def _steps(output: Output, *, scalings: int) -> tuple[str, _Steps | None]:
    """The kind of the only update of a weight, and its steps; None if no program is known that takes steps."""
    only = output.updates[0] if len(output.updates) == 1 else None
    if only is None or output.dtype not in _DTYPES or output.values.dtype != output.dtype:
        return "", None
    if not only.place.is_whole or only.place.transposed or output.patches:
        return "", None
    update, weight, dtype = only.update, only.weight, output.dtype
    if update.kind == "loha" and (loha := cast(LoHa, update)).t1 is None and loha.magnitude is None:
        # LyCORIS makes the first scale a number of the dtype.
        scales = (_number(update.scale, dtype), *[update.scale] * (scalings - 1), weight)
        w1_a, w1_b, w2_a, w2_b = (_array(part, dtype) for part in (loha.w1_a, loha.w1_b, loha.w2_a, loha.w2_b))
        return "loha", _Hadamard(w1_a, w1_b, w2_a, w2_b, scales, dtype)
    lokr = cast(LoKr, update) if update.kind == "lokr" else None
    if lokr is not None and not lokr.interleaved and lokr.magnitude is None and "t2" not in lokr.stored:
        first, second = (_kronecker_factor(lokr, name, dtype) for name in ("w1", "w2"))
        return "lokr", _Kronecker(first, second, (*[update.scale] * scalings, weight), dtype)
    lora = update.as_lora()
    if lora is None or lora.magnitude is None or lora.magnitude_of != "out":
        return "", None
    if lora.embedding or lora.mid is not None or weight != 1:
        return "", None
    return "dora", _Dora(
        _array(lora.b, dtype), _array(lora.a, dtype), lora.scale, _array(lora.magnitude, dtype).reshape(-1, 1), dtype
    )


@dataclass(frozen=True, eq=False)
class _Hadamard:
    """LoHa: left factors (out, rank), right factors (rank, columns)."""

    w1_a: Floats
    w1_b: Floats
    w2_a: Floats
    w2_b: Floats
    scales: tuple[float, ...]
    dtype: str

    def explains(self, start: int, base: Floats, values: Floats) -> bool:
        rows = slice(start, start + len(base))
        first = _rounded_product(self.w1_a[rows], self.w1_b, 1.0, self.dtype)
        second = _rounded_product(self.w2_a[rows], self.w2_b, 1.0, self.dtype)
        return bool(_between(_scaled_sums(base, first, second, self.scales, self.dtype), values).all())


@dataclass(frozen=True, eq=False)
class _Kronecker:
    """LoKr: the least and the largest that W1 (a, c) and W2 (b, columns / c) may be rounded to."""

    first: Sequence[Floats]
    second: Sequence[Floats]
    scales: tuple[float, ...]
    dtype: str

    def explains(self, start: int, base: Floats, values: Floats) -> bool:
        import numpy as np

        each, width = self.second[0].shape
        outer, inner = np.divmod(np.arange(start, start + len(base)), each)
        first = [np.repeat(matrix[outer], width, axis=1) for matrix in self.first]
        second = [np.tile(matrix[inner], (1, self.first[0].shape[1])) for matrix in self.second]
        return bool(_between(_scaled_sums(base, first, second, self.scales, self.dtype), values).all())


@dataclass(frozen=True, eq=False)
class _Dora:
    """DoRA: B (out, rank), A (rank, columns), and a magnitude (out, 1)."""

    b: Floats
    a: Floats
    scale: float
    magnitude: Floats
    dtype: str

    def explains(self, start: int, base: Floats, values: Floats) -> bool:
        import numpy as np

        rows = slice(start, start + len(base))
        deltas = _rounded_product(self.b[rows], self.a, self.scale, self.dtype)
        sums = [round_to(base + delta, self.dtype) for delta in deltas]
        smallest, largest = (pick(abs(sums[0]), abs(sums[1])) for pick in (np.minimum, np.maximum))
        error = _relative_error(base.shape[1])
        norms = (_norms(smallest) * (1 - error), _norms(largest) * (1 + error))
        in_rows = np.zeros(len(base), bool)
        # One norm for all values of a row.
        for norm in (round_to(norm, self.dtype).astype(np.float32) for norm in norms):
            factor = round_to(self.magnitude[rows] / norm, self.dtype)
            between = _between([round_to(factor * total, self.dtype) for total in sums], values)
            in_rows |= between.all(axis=1)
        return bool(in_rows.all())


def _norms(values: Floats) -> Floats:
    import numpy as np

    norms: Floats = np.sqrt(np.square(values.astype(np.float64)).sum(axis=1, keepdims=True))
    return norms


def _scaled_sums(
    base: Floats, first: Sequence[Floats], second: Sequence[Floats], scales: Sequence[float], dtype: str
) -> list[Floats]:
    """The base plus what each two of the matrices give, multiplied entrywise and with each scale, rounded each time."""
    sums = []
    for left, right in product(first, second):
        delta = round_to(left * right, dtype)
        for scale in scales:
            delta = round_to(delta * delta.dtype.type(scale), dtype)
        sums.append(round_to(base + delta, dtype))
    return sums


def _between(ends: Sequence[Floats], values: Floats) -> NDArray[np.bool_]:
    """Which values lie between the least and the largest of `ends`."""
    import numpy as np

    between: NDArray[np.bool_] = (np.minimum.reduce(ends) <= values) & (values <= np.maximum.reduce(ends))
    return between


def _rounded_product(left: Floats, right: Floats, scale: float, dtype: str) -> tuple[Floats, Floats]:
    """The scaled product, lowered and raised by the error of float32, rounded to `dtype`; in float32."""
    import numpy as np

    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    exact = scale * (wide_left @ wide_right)
    slack = abs(scale) * _relative_error(left.shape[1]) * (abs(wide_left) @ abs(wide_right))
    low, high = (round_to(values, dtype).astype(np.float32) for values in (exact - slack, exact + slack))
    return low, high


def _relative_error(terms: int) -> float:
    """The largest error of a float32 sum with this number of terms, relative to the sum of their magnitudes."""
    from loratools.algebra.rounding import gamma, unit_roundoff

    return gamma(terms + _MORE_TERMS, unit_roundoff("F32"))


def _kronecker_factor(update: LoKr, name: str, dtype: str) -> tuple[Floats, ...]:
    """W1 or W2 as a matrix, or the least and the largest that the product of its factors may be rounded to."""
    if name in update.stored:
        return (_array(update.stored[name], dtype),)
    left, right = (_array(update.stored[f"{name}_{side}"], dtype) for side in "ab")
    return _rounded_product(left, right, 1.0, dtype)


def _array(tensor: LazyTensor, dtype: str) -> Floats:
    """A tensor as a matrix of its first axis and all others, rounded to `dtype`, in float32."""
    array = read_array(tensor, "F32")
    return round_to(array.reshape(len(array), -1), dtype)


def _number(value: float, dtype: str) -> float:
    import numpy as np

    return float(round_to(np.array([value]), dtype)[0])
