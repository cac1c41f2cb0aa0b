"""What combining and resizing share: a delta as exact factors, brought to a rank, stored, and what that lost.

Everything is computed in float64 from the factors (`algebra.lowrank`); dense matrices are never formed. Losses are
measured on the values as they are stored, as norms of differences that are formed from factors: subtracting norms
would drown a loss of 1e-9 in rounding.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from loratools.errors import InputError, UsageError
from loratools.ops.lowrank.factors import Layout, exact_factors
from loratools.storage.casting import narrowed
from loratools.storage.files import quoted
from loratools.tensors.dtypes import DTYPE_BITS, parse_float_dtype
from loratools.tensors.lazy import LazyTensor, held
from loratools.updates.lora import LoRA
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Core, Decomposition, Factors
    from loratools.algebra.rank_rules import RankRule
    from loratools.methods import Combination


# Named after kohya's, and each the smallest rank that it asks for; the newest of kohya's does as well.
RULES = ("sv_ratio", "sv_cumulative", "sv_fro")
# Below this many on the shorter side a dense matrix is decomposed in float64, whatever is asked of it.
_SMALL = 384
# Rows of a dense matrix at a time.
_ROWS = 256


@dataclass(frozen=True)
class Limit:
    """How small a module is to become: at most one of the first four; none leaves it as large as it is.

    rank: at most this.
    energy: the smallest rank that keeps this share of the squared Frobenius norm.
    error: the smallest rank with a relative Frobenius error of at most this.
    rule: one of `algebra.rank_rules.NAMED`, and its number.
    max_rank: no rank that one of these gives is above it.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    rule: tuple[str, float] | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("rank", "energy", "error", "rule") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")
        for name in ("rank", "max_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', ' ')} {value} is not positive")
        if self.energy is not None and not 0 < self.energy <= 1:
            percent = 1 < self.energy <= 100
            raise UsageError(
                f"{self.energy:g} is no share of the energy, a number above 0 and at most 1",
                hint=f"did you mean {self.energy / 100:g}?" if percent else None,
            )
        if self.error is not None and not 0 <= self.error <= 1:
            raise UsageError(f"{self.error:g} is no relative error, a number from 0 to 1")
        if self.rule is not None:
            _ensure_known(*self.rule)

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.rank, self.energy, self.error, self.rule, self.max_rank))

    def planned(self, rank: int) -> int | None:
        """The rank that a module of `rank` ends with; None where its values decide."""
        if (self.energy, self.error, self.rule) != (None, None, None):
            return None
        return min([rank, *(r for r in (self.rank, self.max_rank) if r is not None)])

    def chosen(self, s: Tensor, shape: tuple[int, int]) -> int:
        """The rank to cut a matrix with singular values `s` at; at least 1, since formats have no module of rank 0."""
        from loratools.algebra.lowrank import rank_for_energy, rank_for_error
        from loratools.algebra.rank_rules import named_rank

        if self.energy is not None:
            rank = rank_for_energy(s, self.energy, shape=shape)
        elif self.error is not None:
            rank = rank_for_error(s, self.error, shape=shape)
        elif self.rule is not None:
            rank = named_rank(*self.rule, s)
        else:
            rank = len(s) if self.rank is None else self.rank
        return max(1, min(rank, len(s), self.max_rank or rank))

    def rank_rule(self) -> RankRule | None:
        """The same for a decomposition that is found step by step; None where it needs all singular values."""
        from loratools.algebra.rank_rules import AtMost, Fixed, lost_for_energy, lost_for_error

        found: RankRule
        if self.energy is not None:
            found = lost_for_energy(self.energy)
        elif self.error is not None:
            found = lost_for_error(self.error)
        elif self.rule is None and self.given:
            found = Fixed(min(r for r in (self.rank, self.max_rank) if r is not None))
        else:
            return None
        return found if self.max_rank is None else AtMost(found, self.max_rank)


def _ensure_known(name: str, value: float) -> None:
    """Raise UsageError where there is no such rule, or it cannot have that number."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1)
        raise UsageError(
            f"no rule named '{name}'; there are: {', '.join(RULES)}",
            hint=f"did you mean '{near[0]}'?" if near else None,
        )
    if name == "sv_ratio" and not 1 <= value < math.inf:
        raise UsageError(f"sv_ratio cannot be {value:g}; the largest singular value is divided by it: 1 or more")
    if name != "sv_ratio" and not 0 < value <= 1:
        raise UsageError(f"{name} cannot be {value:g}; it is a share, a number above 0 and at most 1")


@dataclass(frozen=True)
class Module:
    """A line of a report: ranks (None of a vector), and what of the delta (Frobenius `norm`) is in the stored values.

    `energy` is the share of the squared norm and `error` the relative Frobenius error.
    """

    name: str
    rank_in: int | None
    rank: int | None
    energy: float
    error: float
    norm: float

    def as_json(self) -> dict[str, object]:
        fields = ("name", "rank_in", "rank", "energy", "error")
        return {field: getattr(self, field) for field in fields}


@dataclass(frozen=True)
class Stored:
    """An update as it will be written, the Frobenius `norm` of what it should be, and that of what is `lost`."""

    update: Update
    norm: float
    lost: float

    def module(self, name: str, rank_in: int | None, rank: int | None) -> Module:
        error = self.lost / self.norm if self.norm else 0.0
        return Module(name, rank_in, rank, max(0.0, 1 - error * error), error, self.norm)


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is stored, with its values and what they should be; not kept, as those of all modules are many."""

    stored: Stored
    factors: Factors
    wanted: Factors | Tensor


def overall_error(modules: Sequence[Module]) -> float:
    """Relative Frobenius error of all modules together."""
    total = math.fsum(m.norm**2 for m in modules)
    lost = math.fsum((m.norm * m.error) ** 2 for m in modules)
    return math.sqrt(lost / total) if total else 0.0


def passed_through(update: Update, factors: Factors, name: str, dtype: str | None) -> Reduced:
    """The update as it is, its tensors byte for byte, unless another dtype is asked for."""
    from loratools.algebra.lowrank import norm

    size = norm(factors)
    if dtype is None or {t.dtype for t in update.parts.values()} == {dtype}:
        return Reduced(Stored(update, size, 0.0), factors, factors)
    tensors = {f.name: getattr(update, f.name) for f in fields(update)}  # type: ignore[arg-type]
    values = {n: t.read() for n, t in tensors.items() if isinstance(t, LazyTensor)}
    _ensure_finite(name, *values.values())
    stored = replace(update, **{n: held(narrowed(name, v, dtype)) for n, v in values.items()})  # type: ignore[type-var]
    kept = stored.factors() or exact_factors(stored, name, "")
    return Reduced(Stored(stored, size, _norm(_difference(factors, kept))), kept, factors)


def reduced(
    wanted: Combination,
    limit: Limit,
    name: str,
    dtype: str,
    *,
    unchanged: Update | None,
    unchanged_dtype: str | None,
    layout: Layout | None = None,
) -> Reduced:
    """The nearest delta within `limit`, stored in `dtype` at scale 1 as a LoRA of such a `layout` (a linear layer's).

    A delta that is within it already is stored as it is; where it is that of the update `unchanged`, as that update.

    Raises:
        UsageError: a dense matrix, and no limit.
    """
    from loratools.algebra.lowrank import Factors, Framed, decompose, norm, truncate

    if not isinstance(wanted, (Factors, Framed)):
        return _reduced_dense(wanted, limit, name, dtype, layout)
    factors = wanted if isinstance(wanted, Factors) else wanted.factors()
    core, rank = None, factors.rank
    if limit.planned(factors.rank) != factors.rank:
        core = _without_noise(decompose(wanted), factors)
        rank = limit.chosen(core.s, (factors.out_features, factors.in_features))
    if core is None or rank >= factors.rank:
        if unchanged is not None:
            return passed_through(unchanged, factors, name, unchanged_dtype)
        update = _stored_as(factors, name, dtype, layout)
        values = _factors(update)
        return Reduced(Stored(update, norm(factors), _norm(_difference(factors, values))), values, factors)
    kept = truncate(core.leading(rank), rank)
    update = _stored_as(kept, name, dtype, layout)
    values = _factors(update)
    rounding = _difference(kept, values)
    # |tail - rounding|^2. The tail is what was cut off: factors - kept, orthogonal to what was kept, so the product is
    # a small difference of small numbers, and only a correction.
    tail = float(core.s[rank:].square().sum())
    product = inner(factors, rounding) - inner(kept, rounding)
    lost = math.sqrt(max(0.0, tail - 2 * product + inner(rounding, rounding)))
    return Reduced(Stored(update, float(core.s.square().sum().sqrt()), lost), values, factors)


def _reduced_dense(delta: Tensor, limit: Limit, name: str, dtype: str, layout: Layout | None) -> Reduced:
    import torch

    from loratools.algebra.lowrank import Svd, fix_signs, truncate
    from loratools.algebra.svd import truncated_svd

    if not limit.given:
        raise UsageError(
            f"the result has no low rank ('{name}' is {delta.shape[1]} -> {delta.shape[0]}), and no limit is given",
            hint="give --rank or --energy, or work in small coordinates: --set space=core",
        )
    rule = limit.rank_rule()
    found: Decomposition
    if rule is None or min(delta.shape) <= _SMALL:
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        rank = limit.chosen(s, (delta.shape[0], delta.shape[1]))
        found = Svd(*fix_signs(u[:, :rank], s[:rank], vt[:rank]))
    else:
        found = truncated_svd(delta, rule)
        rank = len(found.s)
    update = _stored_as(truncate(found, max(1, rank)), name, dtype, layout)
    values = _factors(update)
    residual = 0.0
    for start in range(0, delta.shape[0], _ROWS):
        stop = start + _ROWS
        residual += float((delta[start:stop] - values.b[start:stop] @ values.a).square().sum())
    return Reduced(Stored(update, float(torch.linalg.matrix_norm(delta)), math.sqrt(residual)), values, delta)


def _factors(update: LoRA) -> Factors:
    found = update.factors()
    assert found is not None, "what depends on its base is not reduced"
    return found


def inner(f: Factors, g: Factors) -> float:
    """Frobenius inner product; for values that come from files, which need no balancing to stay in range."""
    return float(((f.b.mT @ g.b) * (f.a @ g.a.mT)).sum())


def widest(dtypes: Sequence[str]) -> str:
    """The narrowest dtype that holds every value of all of them: float16 and bfloat16 only meet in float32."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    widest = max(dtypes, key=lambda d: DTYPE_BITS[d])
    return widest if DTYPE_BITS[widest] > 16 else "F32"


def update_dtype(update: Update) -> str:
    """The widest dtype among the tensors of an update; float32 for those (float8) that are not computed in."""
    found = widest([t.dtype for t in update.parts.values()])
    return found if parse_float_dtype(found) else "F32"


def _without_noise(core: Core, factors: Factors) -> Core:
    """The decomposition with those singular values zero that may be rounding of terms that cancel, as in `x - x`."""
    import torch

    terms = torch.linalg.vector_norm(factors.b, dim=0) * torch.linalg.vector_norm(factors.a, dim=1)
    noise = torch.finfo(torch.float64).eps * max(factors.out_features, factors.in_features) * terms.sum()
    return replace(core, s=torch.where(core.s > noise, core.s, 0.0))


def _stored_as(factors: Factors, name: str, dtype: str, layout: Layout | None) -> LoRA:
    _ensure_finite(name, factors.b, factors.a)
    b, a = (narrowed(name, t, dtype) for t in (factors.b, factors.a))
    return (layout or Layout((b.shape[0], a.shape[1]))).lora(b, a)


def _ensure_finite(name: str, *values: Tensor) -> None:
    if not all(bool(v.isfinite().all()) for v in values):
        raise InputError(
            f"{quoted(name)} has values that are not finite",
            hint="look at the weights that it is given, and at the adapter's alpha",
        )


def _difference(wanted: Factors, found: Factors) -> Factors:
    """Factors of `found - wanted`, each term a rounding error times a factor: nothing large cancels in it."""
    from loratools.algebra.lowrank import Factors, concatenate

    left = Factors(found.b - wanted.b, found.a)
    right = Factors(wanted.b, found.a - wanted.a)
    return concatenate([(1.0, left), (1.0, right)])


def _norm(factors: Factors) -> float:
    """Frobenius norm where terms do not cancel; several times faster than from triangular factors (`lowrank.norm`)."""
    return math.sqrt(max(0.0, inner(factors, factors)))
