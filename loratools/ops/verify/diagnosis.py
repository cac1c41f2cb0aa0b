"""Why a weight of a merged model is not `base + delta`: hypotheses, each held against the values.

A hypothesis is what a program does that goes wrong in a known way. It is told where what is left of `merged - base`
after it is no more than rounding explains; what no hypothesis explains is said to be just that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.verify.measure import Deltas, Fit, blocks
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped
from loratools.updates.parts.deltas import FactorDelta

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# How far a best-fit weight may be from the one that a hypothesis names.
_NEAR = 0.02
# A residual of so many times the square of what one rounding may leave is still rounding: several of them, and deltas
# that were rounded as well.
_ROUNDINGS = 9.0
# A residual that is so small a share of the change is no defect of its own, whatever the dtype.
_NEGLIGIBLE = 1e-11


@dataclass(frozen=True)
class Cause:
    """What explains a weight that is not as it should be.

    Attributes:
        code: The name of the defect.
        message: In words, with the numbers that are the same for all weights with this cause.
        undecided: Whether it may just as well be a right merge.
    """

    code: str
    message: str
    undecided: bool = False


def cause_of(output: Output, merged: LazyTensor, fit: Fit, names: Sequence[str], *, sample: float = 1.0) -> Cause:
    """Tell why a weight is not explained by any recipe.

    Args:
        output: What the weight should be, in the dtype that it is stored in.
        merged: The weight of the merged model.
        fit: What `measure` summed over it.
        names: The names of the adapters that change it, in order.
        sample: The share of the rows to look at.
    """
    weights = fit.weights()
    if fit.moved == 0:
        return Cause("not-applied", "the weights are those of the base: no adapter was applied")
    if _small(fit.residual(weights), fit, output.dtype):
        return _from_weights(output, weights, names)
    for hypothesis in (_without_magnitude, _transposed, _some_ranks):
        if (cause := hypothesis(output, merged, fit, sample)) is not None:
            return cause
    cosine = sum(fit.along) / math.sqrt(fit.moved * fit.energy) if fit.energy > 0 else 0.0
    if abs(cosine) < 0.1:
        return Cause("other-change", "the weights were changed, but not by these adapters (cosine below 0.1)")
    return Cause("unexplained-change", "the change holds these adapters and something else, or a part of them")


def _small(residual: float, fit: Fit, dtype: str) -> bool:
    return residual <= _ROUNDINGS * fit.noise(dtype) + _NEGLIGIBLE * fit.moved


def _from_weights(output: Output, weights: Sequence[float | None], names: Sequence[str]) -> Cause:
    """What the best-fit weights say, where they explain the change."""
    known = [w for w in weights if w is not None]
    if all(_is(w, 1) for w in known):
        return Cause(
            "rounded-otherwise",
            "the adapters were applied as given, but rounded in a way that cannot be computed again from what is here",
            undecided=True,
        )
    if len(known) == 1:
        return _from_weight(output, known[0])
    wrong = [
        f"'{name}' has {'weight ' + format(w, '.3g') if abs(w) >= _NEAR else 'not been applied'}"
        for name, w in zip(names, weights, strict=True)
        if w is not None and not _is(w, 1)
    ]
    return Cause("adapter-weight", f"relative to the weights given, {'; '.join(wrong)}")


def _from_weight(output: Output, weight: float) -> Cause:
    update = output.updates[0].update
    lora = update.as_lora()
    scale, rank = update.scale, update.rank or 0
    if abs(weight) < _NEAR:
        return Cause("not-applied", "the weights are those of the base: no adapter was applied")
    if _is(weight, -1):
        return Cause("subtracted", "the adapter was subtracted (best-fit weight -1)")
    if lora is not None and rank > 1 and lora.rslora and _is(weight * math.sqrt(rank), 1):
        return Cause("rslora-ignored", "rsLoRA was ignored: alpha / rank in place of alpha / sqrt(rank)")
    if _is(weight, 2):
        other = ", or its scale was taken to be alpha / sqrt(rank)" if rank == 4 else ""
        return Cause("applied-twice", f"the adapter was applied twice (best-fit weight 2){other}")
    if lora is not None and rank > 1 and not lora.rslora and _is(weight / math.sqrt(rank), 1):
        return Cause("rslora-assumed", "alpha / sqrt(rank) in place of alpha / rank: rsLoRA was assumed")
    if not _is(scale, 1) and _is(weight * scale, 1):
        return Cause("scale-ignored", f"the scale alpha / rank = {scale:g} was ignored (best-fit weight {weight:.3g})")
    if not _is(scale, 1) and _is(weight, scale):
        return Cause("scale-twice", f"the scale alpha / rank = {scale:g} was applied twice")
    return Cause("adapter-weight", f"the adapter was applied with {weight:.3g} times the weight given")


def _is(value: float, expected: float) -> bool:
    return abs(value - expected) <= _NEAR * abs(expected)


def _without_magnitude(output: Output, merged: LazyTensor, fit: Fit, sample: float) -> Cause | None:
    """DoRA, merged as if it were LoRA."""

    loras = [u.update.as_lora() for u in output.updates]
    if not any(lora is not None and lora.magnitude is not None for lora in loras):
        return None
    updates = tuple(
        u if lora is None else replace(u, update=replace(lora, magnitude=None))
        for u, lora in zip(output.updates, loras, strict=True)
    )
    if not _small(_residual_of(replace(output, updates=updates), merged, sample), fit, output.dtype):
        return None
    return Cause("magnitude-dropped", "the magnitude of DoRA was dropped: the adapter was merged as plain LoRA")


def _transposed(output: Output, merged: LazyTensor, fit: Fit, sample: float) -> Cause | None:
    """A delta that was added to a square weight the other way round."""
    rows, columns = output.matrix
    plain = [u for u in output.updates if u.place.whole and not u.update.needs_base and u.update.as_experts() is None]
    if rows != columns or len(plain) != len(output.updates):
        return None
    flipped = tuple(replace(u, place=replace(u.place, transposed=not u.place.transposed)) for u in plain)
    if not _small(_residual_of(replace(output, updates=flipped), merged, sample), fit, output.dtype):
        return None
    return Cause("transposed", "the delta was added transposed")


def _some_ranks(output: Output, merged: LazyTensor, fit: Fit, sample: float) -> Cause | None:
    """Some of the `rank` terms `b_k a_k` that a LoRA is the sum of, and not others."""
    import numpy as np

    delta = _single_product(output)
    if delta is None or delta.terms < 2:
        return None
    terms = delta.terms
    b, a = delta.b.astype(np.float64), delta.a.astype(np.float64)
    stored = reshaped(merged, output.matrix)
    gram, along = np.zeros((terms, terms)), np.zeros(terms)
    for start, stop in blocks(output, sample):
        moved = read_array(stored, "F64", start, stop) - _base_rows(output, start, stop)
        along += np.einsum("ik,ik->k", b[start:stop], moved @ a.T)
        gram += b[start:stop].T @ b[start:stop]
    gram *= a @ a.T
    shares = np.linalg.lstsq(gram, along, rcond=1e-10)[0]
    residual = max(0.0, float(fit.moved - 2 * shares @ along + shares @ gram @ shares))
    present = int(np.sum(np.abs(shares - 1) <= 0.1))
    absent = int(np.sum(np.abs(shares) <= 0.1))
    if not _small(residual, fit, output.dtype) or present + absent != terms or absent == 0:
        return None
    return Cause("ranks-missing", f"only {present} of the {terms} terms of rank 1 were applied")


def _single_product(output: Output) -> FactorDelta | None:
    """The product of factors that is the whole delta; None where it is something else."""
    from loratools.ops.merge.rows import prepared

    placed = prepared(output, "F64", 0, output.rows)
    only = placed[0].delta if len(placed) == 1 and placed[0].everywhere else None
    return only if len(output.updates) == 1 and isinstance(only, FactorDelta) else None


def _base_rows(output: Output, start: int, stop: int) -> Floats:
    from loratools.ops.merge.rows import read_rows

    return read_rows(output, "F64", start, stop)


def _residual_of(output: Output, merged: LazyTensor, sample: float) -> float:
    """`|merged - base - dW|^2` for the updates of `output`, each at its weight."""
    import numpy as np

    deltas = Deltas(output, "F64")
    stored = reshaped(merged, output.matrix)
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in blocks(output, sample):
            base = _base_rows(output, start, stop)
            left = read_array(stored, "F64", start, stop) - base
            for part in deltas.rows(start, stop, base):
                left = left - part
            total += float(np.vdot(left, left))
    return total if math.isfinite(total) else math.inf
