"""Why a weight of a merged model is not `base + delta`: hypotheses, each held against the values.

A hypothesis is a known mistake of a program that merges. It is reported if the residual of `merged - base` after it is
explained by rounding. If no hypothesis explains the values, the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rows import prepared, read_rows
from loratools.ops.merge.trained_on import AsTrained, TrainingScheme, as_trained
from loratools.ops.merge.verify import exact_rows, largest_share
from loratools.ops.verify.cause import Cause
from loratools.ops.verify.deltas import Deltas, blocks
from loratools.ops.verify.fit import Fit
from loratools.ops.verify.measure import explained_with
from loratools.ops.verify.other_factors import factors_added, rows_reordered
from loratools.ops.verify.stepped import scaled_twice_in_steps
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped
from loratools.updates.parts.deltas import FactorDelta, HadamardDelta, ScaledDelta

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# How far a best-fit weight may be from the one that a hypothesis names, at most: nearer, where rounding is finer.
_NEAR = 0.02
# What float32 sums over millions of values leave of a best-fit weight's digits.
_DIGITS = 1e-5
# A residual of this multiple of the square of one rounding error is still rounding: several roundings, and deltas that
# were rounded as well.
_ROUNDINGS = 9.0
# A residual that is so small a share of the change is no defect of its own, whatever the dtype.
_NEGLIGIBLE = 1e-11
# What decomposing, transforming or rotating a whole weight in float32 leaves, relative to the weight.
_DECOMPOSED = 2.0**-16
# The share of the rows by which a hypothesis is refused before all of them are looked at: one block.
_GLANCE = 1e-6
# Dtypes in which an update may be smaller than the spacing of the numbers.
_COARSE = ("BF16", "F16")
# The square of an update beside that of one rounding: above it, a best-fit weight is exact to a few percent.
_LARGE = 1000.0
_ABOUT = 0.5
# What bitsandbytes may have made of the base in training.
_TRAINING_SCHEMES = (
    TrainingScheme("nf4"),
    TrainingScheme("nf4", nested=True),
    TrainingScheme("int8"),
    TrainingScheme("fp4"),
    TrainingScheme("fp4", nested=True),
)


ROUNDED_OTHERWISE = Cause(
    "rounded-otherwise",
    "the adapters were applied as given, up to one rounding of each value, but rounded in a way that cannot be "
    "computed again from what is here",
    undecided=True,
)


COMPUTED_OTHERWISE = Cause(
    "rounded-otherwise",
    "the adapters were applied with the weights given, and what differs is no more than rounding leaves; but no known "
    "way of computing gives exactly these values",
    undecided=True,
)


def cause_of(output: Output, merged: LazyTensor, fit: Fit, names: Sequence[str], sample: float = 1.0) -> Cause:
    """Tell why a weight is not explained by any recipe.

    Args:
        output: What the weight should be, in the dtype that it is stored in.
        merged: The weight of the merged model.
        fit: What `measure` summed over it.
        names: The names of the adapters that change it, in order.
        sample: The share of the rows to look at.
    """
    weights = fit.weights()
    if not math.isfinite(fit.moved):
        too_large = Cause("unexplained-change", "the change is too large for its squares to be added up")
        return overflow(output, merged) or too_large
    if fit.moved == 0:
        return Cause("not-applied", "the weights are those of the base: no adapter was applied")
    if scaled_twice_in_steps(output, reshaped(merged, output.matrix), sample):
        return _scale_twice(output.updates[0].update.scale)
    if _is_a_neighbour(output, merged, sample):
        # Small updates: a best-fit weight is then mostly noise, and a hypothesis has to give every value.
        candidates = candidate_weights(output, names)
        causes = (cause for times, cause in candidates if explained_with(output, merged, times, sample))
        return next(causes, ROUNDED_OTHERWISE)
    allowed = rounding_allowance(output, fit)
    if fit.residual(weights) <= allowed:
        fitted = _from_weights(output, fit, names, allowed)
        if fitted.code != "adapter-weight" or fit.energy > _LARGE * allowed / _ROUNDINGS:
            return fitted
        return _certain(fitted, output, merged, fit, names, sample)
    for hypothesis in (
        _without_magnitude, _transposed, _some_ranks, _factors_added, _rows_reordered, _other_training_values,
    ):  # fmt: skip
        if (cause := hypothesis(output, merged, fit, allowed, sample)) is not None:
            return cause
    if abs(fit.cosine) < 0.1:
        return Cause("other-change", "the weights were changed by other things than these adapters (cosine below 0.1)")
    return Cause("unexplained-change", "the change holds these adapters and something else, or a part of them")


def _certain(cause: Cause, output: Output, merged: LazyTensor, fit: Fit, names: Sequence[str], sample: float) -> Cause:
    """What is said of best-fit weights that mean nothing by themselves, where rounding may have moved them.

    The rounding of an update that is about as large as the spacing of the dtype moves a best-fit weight by far more
    than `_NEAR`. There a hypothesis has to give every value, and a weight that is only near to 1 is no finding.
    """
    for times, certain_cause in candidate_weights(output, names):
        if explained_with(output, merged, times, sample):
            return certain_cause
    near = all(w is None or abs(w - 1) < _ABOUT for w in fit.weights())
    return COMPUTED_OTHERWISE if near else cause


def _is_decomposed(output: Output) -> bool:
    """Whether a delta is computed from a whole weight, or all at once, and not by factors for rows and columns."""
    if not any(u.update.needs_base or u.update.whole_delta for u in output.updates):
        return False
    deltas = prepared(output, "F32", 0, output.rows)
    return any(not isinstance(added.delta, ScaledDelta | HadamardDelta) for added in deltas)


def overflow(output: Output, merged: LazyTensor) -> Cause | None:
    """Values that are no numbers where the base has some, mostly an overflow; None if there are none.

    The dtype is named with the largest number that it has. The values of the base are only looked at where that is
    needed.
    """
    import torch

    from loratools.ops.inspect.values import non_finite_count
    from loratools.tensors.dtypes import torch_dtype

    count = non_finite_count(merged, lambda nbytes: None) or 0
    if not count or count == non_finite_count(output.values, lambda nbytes: None):
        return None
    largest = torch.finfo(torch_dtype(merged.dtype)).max
    number = "value is" if count == 1 else "values are"
    return Cause(
        "not-finite", f"{count:,} {number} NaN or infinite; the largest number of {merged.dtype} is {largest:.5g}"
    )


def rounding_allowance(output: Output, fit: Fit) -> float:
    """The square of what rounding may leave in all: several roundings of each value, and float32 in between."""
    decomposed = _DECOMPOSED**2 * fit.merged if _is_decomposed(output) else 0.0
    return _ROUNDINGS * fit.noise(output.dtype) + _NEGLIGIBLE * fit.moved + decomposed


def _from_weights(output: Output, fit: Fit, names: Sequence[str], allowed: float) -> Cause:
    """What the best-fit weights say, where they explain the change."""
    uncertain = fit.uncertainties(allowed)
    determined = [
        (name, weight, min(_NEAR, _DIGITS + uncertainty))
        for name, weight, uncertainty in zip(names, fit.weights(), uncertain, strict=True)
        if weight is not None
    ]
    wrong = [(name, weight, near) for name, weight, near in determined if not _is(weight, 1, near)]
    if not wrong:
        return COMPUTED_OTHERWISE
    if len(determined) == 1:
        return cause_of_weight(output, wrong[0][1], near=wrong[0][2])
    differing = [
        f"'{name}' has {'weight ' + format(weight, '.3g') if abs(weight) >= near else 'not been applied'}"
        for name, weight, near in wrong
    ]
    return Cause("adapter-weight", f"relative to the weights given, {'; '.join(differing)}")


def cause_of_weight(output: Output, weight: float, *, near: float = _DIGITS) -> Cause:
    """What it says that the delta of a single adapter is multiplied with `weight`, which is known up to `near`."""
    update = output.updates[0].update
    lora = update.as_lora()
    scale, rank = update.scale, update.rank or 0
    if abs(weight) < near:
        return Cause("not-applied", "the weights are those of the base: no adapter was applied")
    if _is(weight, -1, near):
        return Cause("subtracted", "the adapter was subtracted (best-fit weight -1)")
    if lora is not None and rank > 1 and lora.rslora and _is(weight * math.sqrt(rank), 1, near):
        return Cause("rslora-ignored", "rsLoRA was ignored: alpha / rank in place of alpha / sqrt(rank)")
    if _is(weight, 2, near):
        or_rslora = ", or its scale was taken to be alpha / sqrt(rank)" if rank == 4 else ""
        return Cause("applied-twice", f"the adapter was applied twice (best-fit weight 2){or_rslora}")
    if lora is not None and rank > 1 and not lora.rslora and _is(weight / math.sqrt(rank), 1, near):
        return Cause("rslora-assumed", "alpha / sqrt(rank) in place of alpha / rank: rsLoRA was assumed")
    if not _is(scale, 1, near) and _is(weight * scale, 1, near):
        return Cause("scale-ignored", f"the scale alpha / rank = {scale:g} was ignored (best-fit weight {weight:.3g})")
    if not _is(scale, 1, near) and _is(weight, scale, near):
        return _scale_twice(scale)
    return Cause("adapter-weight", f"the adapter was applied with {_number(weight)} times the weight given")


def _scale_twice(scale: float) -> Cause:
    return Cause("scale-twice", f"the scale alpha / rank = {scale:g} was applied twice")


def candidate_weights(output: Output, names: Sequence[str]) -> Iterator[tuple[Sequence[float], Cause]]:
    """What the deltas may have been multiplied with, and what that would say."""
    if len(names) > 1:
        yield [0.0] * len(names), Cause("not-applied", "the weights are those of the base: no adapter was applied")
        for i, name in enumerate(names):
            for share, meaning in ((0.0, "not been applied"), (-1.0, "weight -1"), (2.0, "weight 2")):
                message = f"relative to the weights given, '{name}' has {meaning}"
                yield [share if i == j else 1.0 for j in range(len(names))], Cause("adapter-weight", message)
        return
    update = output.updates[0].update
    scale, rank = update.scale, update.rank or 1
    shares = [0.0, -1.0, 2.0, 1 / math.sqrt(rank), math.sqrt(rank)]
    shares += [1 / scale, scale] if scale else []
    for share in dict.fromkeys(share for share in shares if abs(share - 1) > 0.02):
        yield [share], cause_of_weight(output, share)


def _is_a_neighbour(output: Output, merged: LazyTensor, sample: float) -> bool:
    """Whether every value is one of the two numbers that its sum lies between, as any rounding would have it."""
    import numpy as np

    if output.dtype not in _COARSE:
        return False
    from loratools.algebra.rounding import merge_error_bound

    deltas = prepared(output, "F64", 0, output.rows)
    terms = sum(delta.terms for delta in deltas)
    stored = reshaped(merged, output.matrix)
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in blocks(output, sample):
            base, values = _base_rows(output, start, stop), read_array(stored, "F64", start, stop)
            exact, magnitude = exact_rows(deltas, start, base)
            bound = merge_error_bound(abs(base), magnitude, values, output.dtype, terms, nearest=False)
            if not largest_share(abs(values - exact), bound) <= 1:
                return False
    return True


def _is(value: float, expected: float, near: float) -> bool:
    return abs(value - expected) <= near * abs(expected)


def _number(weight: float) -> str:
    """A weight with three digits, or with enough digits to differ from 1."""
    return next(text for digits in (3, 4, 5, 6, 9) if (text := f"{weight:.{digits}g}") != "1" or digits == 9)


def plain_lora(output: Output) -> Output | None:
    """The output with every DoRA as the LoRA that it has without its magnitude; None if there is none."""
    loras = [u.update.as_lora() for u in output.updates]
    if not any(lora is not None and lora.magnitude is not None for lora in loras):
        return None
    updates = tuple(
        u if lora is None else replace(u, update=replace(lora, magnitude=None))
        for u, lora in zip(output.updates, loras, strict=True)
    )
    return replace(output, updates=updates)


def flipped(output: Output) -> Output | None:
    """The output with every delta the other way round; None if it is not square, or a delta has no other way."""
    rows, columns = output.matrix
    plain = [
        u for u in output.updates if u.place.is_whole and not u.update.needs_base and u.update.as_experts() is None
    ]
    if rows != columns or len(plain) != len(output.updates):
        return None
    updates = tuple(replace(u, place=replace(u.place, transposed=not u.place.transposed)) for u in plain)
    return replace(output, updates=updates)


MAGNITUDE_DROPPED = Cause(
    "magnitude-dropped", "the magnitude of DoRA was dropped: the adapter was merged as plain LoRA"
)
TRANSPOSED = Cause("transposed", "the delta was added transposed")


def _without_magnitude(output: Output, merged: LazyTensor, fit: Fit, allowed: float, sample: float) -> Cause | None:
    """DoRA, merged as if it were LoRA."""
    plain = plain_lora(output)
    if plain is None or residual_of(plain, merged, sample) > allowed:
        return None
    return MAGNITUDE_DROPPED


def _transposed(output: Output, merged: LazyTensor, fit: Fit, allowed: float, sample: float) -> Cause | None:
    """A delta that was added to a square weight the other way round."""
    transposed_output = flipped(output)
    if transposed_output is None or residual_of(transposed_output, merged, sample) > allowed:
        return None
    return TRANSPOSED


def _factors_added(output: Output, merged: LazyTensor, fit: Fit, allowed: float, sample: float) -> Cause | None:
    """Several LoRAs whose A and whose B were added, each on their own."""
    for way, added in factors_added(output):
        if residual_of(added, merged, sample) <= allowed:
            message = (
                f"A and B of the adapters were added each on their own ({way}): the product then also holds the A of "
                "one adapter with the B of another"
            )
            return Cause("factors-added", message)
    return None


def _rows_reordered(output: Output, merged: LazyTensor, fit: Fit, allowed: float, sample: float) -> Cause | None:
    """Rows of attention heads in the order of another layout of rotary embeddings."""
    for way, reordered in rows_reordered(output):
        if leaves_at_most(allowed, reordered, merged, sample):
            return Cause("rows-reordered", f"the rows of the delta were added in another order: {way}")
    return None


def _other_training_values(output: Output, merged: LazyTensor, fit: Fit, allowed: float, sample: float) -> Cause | None:
    """Adapters that were added to what a quantisation makes of the base, or to the base in place of that."""
    source = output.values.source
    if isinstance(source, AsTrained):
        plain = replace(output, values=source.of)
        if residual_of(plain, merged, sample) > allowed:
            return None
        message = f"the adapters were added to the base itself, and not to what {source.scheme} makes of it"
        return Cause("training-values-ignored", message)
    for scheme in _TRAINING_SCHEMES:
        on_training_values = as_trained(output, scheme)
        if on_training_values is not None and residual_of(on_training_values, merged, sample) <= rounding_allowance(
            output, fit
        ):
            message = (
                f"the adapters were added to what {scheme} makes of the base, as training may have seen it; if that "
                "was wanted, say so with --trained-on"
            )
            return Cause("training-values", message)
    return None


def _some_ranks(output: Output, merged: LazyTensor, fit: Fit, allowed: float, sample: float) -> Cause | None:
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
    if residual > allowed or present + absent != terms or absent == 0:
        return None
    return Cause("ranks-missing", f"only {present} of the {terms} terms of rank 1 were applied")


def _single_product(output: Output) -> FactorDelta | None:
    """The product of factors that is the whole delta; None if it is something else."""
    deltas = prepared(output, "F64", 0, output.rows)
    only = deltas[0].delta if len(deltas) == 1 and deltas[0].everywhere else None
    return only if len(output.updates) == 1 and isinstance(only, FactorDelta) else None


def _base_rows(output: Output, start: int, stop: int) -> Floats:
    return read_rows(output, "F64", start, stop)


def leaves_at_most(allowed: float, output: Output, merged: LazyTensor, sample: float) -> bool:
    """Whether the updates of `output` leave a residual of at most `allowed`; most that do not show it in a few rows."""
    return all(residual_of(output, merged, share) <= allowed for share in (_GLANCE, sample))


def residual_of(output: Output, merged: LazyTensor, sample: float) -> float:
    """The residual `|merged - base - dW|^2` for the updates of `output`, each at its weight."""
    import numpy as np

    deltas = Deltas(output, "F64")
    stored = reshaped(merged, output.matrix)
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in blocks(output, sample):
            base = _base_rows(output, start, stop)
            residual = read_array(stored, "F64", start, stop) - base
            for part in deltas.rows(start, stop, base):
                residual = residual - part
            total += float(np.vdot(residual, residual))
    return total if math.isfinite(total) else math.inf
