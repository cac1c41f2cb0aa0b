"""Reduction of a delta: exact factors, truncated to a rank, stored in a dtype, with the measured loss.

Everything is computed in float64 from the factors (`algebra.lowrank`); dense matrices are never formed. Losses are
measured on the stored values, as norms of differences formed from factors: a difference of norms would drown a loss of
1e-9 in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.ops.common.finite import OUT_OF_RANGE, require_finite
from loratools.ops.lowrank.factors import Layout, exact_factors
from loratools.ops.lowrank.limit import Limit
from loratools.storage.casting import narrowed
from loratools.tensors.dtypes import DTYPE_BITS, parse_float_dtype
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.updates.lora import LoRA
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Core, Decomposition, Factors
    from loratools.methods import Combination


# Below this size of the shorter side, a dense matrix is always decomposed in float64.
_SMALL = 384
# Rows of a dense matrix that are read at a time.
_ROWS = 256


@dataclass(frozen=True)
class ReducedModule:
    """The ranks and the error of one module of a result.

    Attributes:
        name: The name of the module.
        rank_in: The rank before; None for a vector.
        rank: The stored rank; None for a vector.
        energy: The share of the squared Frobenius norm that the stored values keep.
        error: The relative Frobenius error of the stored values.
        norm: The Frobenius norm of the exact delta.
    """

    name: str
    rank_in: int | None
    rank: int | None
    energy: float
    error: float
    norm: float

    @property
    def numbers(self) -> list[int | float | None]:
        """What was measured, in the order of the arguments behind the name."""
        return [self.rank_in, self.rank, self.energy, self.error, self.norm]

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `modules` in the documents of `loratools resize --json` and `loratools
        combine --json`.
        """
        fields = ("name", "rank_in", "rank", "energy", "error")
        return {field: getattr(self, field) for field in fields}


@dataclass(frozen=True)
class Stored:
    """An update as it will be written, the Frobenius `norm` of the exact delta, and that of what is `lost`."""

    update: Update
    norm: float
    lost: float

    def module(self, name: str, rank_in: int | None, rank: int | None) -> ReducedModule:
        error = self.lost / self.norm if self.norm else 0.0
        return ReducedModule(name, rank_in, rank, max(0.0, 1 - error * error), error, self.norm)


@dataclass(frozen=True, eq=False)
class Reduced:
    """The stored values and the exact ones of one module. They are not kept, since those of all modules are large."""

    stored: Stored
    factors: Factors
    target: Factors | Tensor


def overall_error(modules: Sequence[ReducedModule]) -> float:
    """The relative Frobenius error over all modules."""
    total = math.fsum(m.norm**2 for m in modules)
    lost = math.fsum((m.norm * m.error) ** 2 for m in modules)
    return math.sqrt(lost / total) if total else 0.0


def passed_through(update: Update, factors: Factors, name: str, dtype: str | None) -> Reduced:
    """The update unchanged, its tensors byte for byte, or cast if another dtype is requested."""
    from loratools.algebra.lowrank import norm

    size = norm(factors)
    if dtype is None or {t.dtype for t in update.parts.values()} == {dtype}:
        return Reduced(Stored(update, size, 0.0), factors, factors)
    tensors = {f.name: getattr(update, f.name) for f in fields(update)}  # type: ignore[arg-type]
    values = {n: t.read() for n, t in tensors.items() if isinstance(t, LazyTensor)}
    require_finite("the result", name, OUT_OF_RANGE, *values.values())
    stored = replace(update, **{n: from_torch(narrowed(name, v, dtype)) for n, v in values.items()})  # type: ignore[type-var]
    stored_factors = stored.factors() or exact_factors(stored, name, "")
    return Reduced(Stored(stored, size, _norm(_difference(factors, stored_factors))), stored_factors, factors)


def reduced(
    target: Combination,
    limit: Limit,
    name: str,
    dtype: str,
    *,
    unchanged: Update | None,
    unchanged_dtype: str | None,
    layout: Layout | None = None,
) -> Reduced:
    """The nearest delta within `limit`, stored in `dtype` at scale 1 as a LoRA with the layout `layout` (a linear
    layer's by default).

    A delta within the limit is stored as it is; if it is also the delta of the update `unchanged`, that update is kept.

    Raises:
        UsageError: The matrix is dense, and no limit is given.
    """
    from loratools.algebra.lowrank import Factors, Framed, decompose, norm, truncate

    if not isinstance(target, (Factors, Framed)):
        return _reduced_dense(target, limit, name, dtype, layout)
    factors = target if isinstance(target, Factors) else target.factors()
    core, rank = None, factors.rank
    if limit.planned(factors.rank) != factors.rank:
        core = _without_noise(decompose(target), factors)
        rank = limit.chosen(core.s, (factors.out_features, factors.in_features))
    if core is None or rank >= factors.rank:
        if unchanged is not None:
            return passed_through(unchanged, factors, name, unchanged_dtype)
        update = _stored_as(factors, name, dtype, layout)
        values = _factors(update)
        return Reduced(Stored(update, norm(factors), _norm(_difference(factors, values))), values, factors)
    truncated = truncate(core.leading(rank), rank)
    update = _stored_as(truncated, name, dtype, layout)
    values = _factors(update)
    rounding = _difference(truncated, values)
    # |tail - rounding|^2. The tail is what was cut off: factors - kept. It is orthogonal to the kept part, so the
    # product is a small difference of small numbers, and only a correction.
    tail = float(core.s[rank:].square().sum())
    product = inner(factors, rounding) - inner(truncated, rounding)
    lost = math.sqrt(max(0.0, tail - 2 * product + inner(rounding, rounding)))
    return Reduced(Stored(update, float(core.s.square().sum().sqrt()), lost), values, factors)


def _reduced_dense(delta: Tensor, limit: Limit, name: str, dtype: str, layout: Layout | None) -> Reduced:
    import torch

    from loratools.algebra.lowrank import Svd, fix_signs, truncate
    from loratools.algebra.svd import truncated_svd

    if not limit.is_given:
        raise UsageError(
            f"the result has no low rank ('{name}' is {delta.shape[1]} -> {delta.shape[0]}), and no limit is given",
            hint="give --rank or --energy, or work in small coordinates: --set space=core",
        )
    rule = limit.rank_rule()
    svd: Decomposition
    if rule is None or min(delta.shape) <= _SMALL:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        rank = limit.chosen(s, (delta.shape[0], delta.shape[1]))
        svd = Svd(*fix_signs(u[:, :rank], s[:rank], vt[:rank]))
    else:
        svd = truncated_svd(delta, rule)
        rank = len(svd.s)
    update = _stored_as(truncate(svd, max(1, rank)), name, dtype, layout)
    values = _factors(update)
    residual = 0.0
    for start in range(0, delta.shape[0], _ROWS):
        stop = start + _ROWS
        residual += float((delta[start:stop] - values.b[start:stop] @ values.a).square().sum())
    return Reduced(Stored(update, float(torch.linalg.matrix_norm(delta)), math.sqrt(residual)), values, delta)


def _factors(update: LoRA) -> Factors:
    factors = update.factors()
    assert factors is not None, "updates that depend on the base cannot be reduced"
    return factors


def inner(f: Factors, g: Factors) -> float:
    """The Frobenius inner product of stored values, which need no balancing to stay in range."""
    return float(((f.b.mT @ g.b) * (f.a @ g.a.mT)).sum())


def widest(dtypes: Sequence[str]) -> str:
    """The narrowest dtype that holds every value of all of them: float16 and bfloat16 only meet in float32."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    widest = max(dtypes, key=lambda d: DTYPE_BITS[d])
    return widest if DTYPE_BITS[widest] > 16 else "F32"


def update_dtype(update: Update) -> str:
    """The widest dtype among the tensors of an update; float32 for dtypes without arithmetic (float8)."""
    dtype = widest([t.dtype for t in update.parts.values()])
    return dtype if parse_float_dtype(dtype) else "F32"


def _without_noise(core: Core, factors: Factors) -> Core:
    """The decomposition, with singular values set to zero that may be rounding of terms that cancel, as in `x - x`."""
    import torch

    terms = torch.linalg.vector_norm(factors.b, dim=0) * torch.linalg.vector_norm(factors.a, dim=1)
    noise = torch.finfo(torch.float64).eps * max(factors.out_features, factors.in_features) * terms.sum()
    return replace(core, s=torch.where(core.s > noise, core.s, 0.0))


def _stored_as(factors: Factors, name: str, dtype: str, layout: Layout | None) -> LoRA:
    require_finite("the result", name, OUT_OF_RANGE, factors.b, factors.a)
    b, a = (narrowed(name, t, dtype) for t in (factors.b, factors.a))
    return (layout or Layout((b.shape[0], a.shape[1]))).lora(b, a)


def _difference(target: Factors, stored: Factors) -> Factors:
    """Factors of `stored - exact`, each term a rounding error times a factor: nothing large cancels in it."""
    from loratools.algebra.lowrank import Factors, concatenate

    error_of_b = Factors(stored.b - target.b, stored.a)
    error_of_a = Factors(target.b, stored.a - target.a)
    return concatenate([(1.0, error_of_b), (1.0, error_of_a)])


def _norm(factors: Factors) -> float:
    """The Frobenius norm of factors whose terms do not cancel; several times faster than from triangular factors
    (`lowrank.norm`).
    """
    return math.sqrt(max(0.0, inner(factors, factors)))
