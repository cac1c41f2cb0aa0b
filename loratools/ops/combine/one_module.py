"""One module of a combination: the method's result, calibrated, truncated, stored, and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.methods import Terms
from loratools.ops.combine.modules import WeightedUpdate
from loratools.ops.combine.residual import lost_update
from loratools.ops.combine.settings import ModuleSettings
from loratools.ops.combine.shares import CombinedModule, Part, parts_of
from loratools.ops.lowrank.factors import Layout, exact_factors, is_vector, layout_of
from loratools.ops.lowrank.reduce import ReducedModule, passed_through, reduced, update_dtype, widest
from loratools.tensors.lazy import from_torch
from loratools.updates.full import Full
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.methods import Combination


@dataclass(frozen=True, eq=False)
class ModuleResult:
    """A module of the result.

    Attributes:
        update: As it is stored.
        line: Its line in the report.
        parts: What each adapter contributed.
        lost: What must be added to `update` to have everything; None if that is rounding, or was not asked for.
    """

    update: Update
    line: CombinedModule
    parts: tuple[Part, ...]
    lost: Update | None


def combine_module(
    name: str, updates: Sequence[WeightedUpdate], settings: ModuleSettings, *, residual: bool
) -> ModuleResult:
    """Combine the updates of one module.

    Args:
        name: The module.
        updates: Those that the adapters have for it, at least one.
        settings: What is asked of every module.
        residual: Whether to work out what is lost.
    """
    factors = tuple(exact_factors(u.update, name, u.adapter_name) for u in updates)
    dtype = settings.dtype or widest([update_dtype(u.update) for u in updates])
    if is_vector(updates[0].update):
        return _summed_vectors(name, updates, factors, settings, dtype)
    weights, scales = tuple(u.weight for u in updates), tuple(_scale(u.update) for u in updates)
    terms = Terms(name, factors, weights, scales, settings.seed)
    target = _normed(_calibrated(settings.method.combine(terms, **settings.options), terms, settings), terms, settings)
    # A method that changes nothing returns the object that it was given.
    unchanged = next((u.update for u, f in zip(updates, factors, strict=True) if f is target), None)
    if unchanged is not None and not settings.keep_kinds and unchanged.as_lora() is None:
        unchanged = None
    nearest = reduced(
        target,
        settings.limit,
        name,
        dtype,
        unchanged=unchanged,
        unchanged_dtype=settings.dtype,
        layout=_common_layout([u.update for u in updates]),
    )
    parts = parts_of([(u.index, u.weight, f) for u, f in zip(updates, factors, strict=True)], nearest)
    line = nearest.stored.module(name, sum(f.rank for f in factors), nearest.factors.rank)
    lost = lost_update(nearest, terms, settings, name, dtype) if residual else None
    return ModuleResult(nearest.stored.update, with_adapters(line, parts), parts, lost)


def _summed_vectors(
    name: str, updates: Sequence[WeightedUpdate], factors: Sequence[Factors], settings: ModuleSettings, dtype: str
) -> ModuleResult:
    """Differences of a bias, a norm or a table, which can only be added up, whatever the method."""
    import torch

    from loratools.algebra.lowrank import Factors

    if len(updates) == 1 and updates[0].weight == 1:
        stored = passed_through(updates[0].update, factors[0], name, settings.dtype)
    else:
        total = torch.stack([u.weight * (f.b @ f.a) for u, f in zip(updates, factors, strict=True)]).sum(dim=0)
        one = torch.ones(1, 1, dtype=torch.float64)
        # A column, or a row.
        summed = Factors(total, one) if total.shape[1] == 1 else Factors(one, total)
        stored = passed_through(
            Full(from_torch(total.reshape([size or -1 for size in updates[0].update.shape]))), summed, name, dtype
        )
    parts = parts_of([(u.index, u.weight, f) for u, f in zip(updates, factors, strict=True)], stored)
    parts = tuple(replace(p, overlaps=()) for p in parts)
    line = stored.stored.module(name, None, None)
    return ModuleResult(stored.stored.update, with_adapters(line, parts), parts, None)


def with_adapters(line: ReducedModule, parts: Sequence[Part]) -> CombinedModule:
    """The line of a module in the report, with what became of each adapter there."""
    return CombinedModule(**vars(line), adapters=tuple(part.share() for part in parts))


def _scale(update: Update) -> float | None:
    """The scale of a plain pair of factors; None of any other kind."""
    lora = update.as_lora()
    return None if lora is None or lora.mid is not None or lora.embedding else lora.scale


def _common_layout(updates: Sequence[Update]) -> Layout:
    return max((layout_of(u) for u in updates), key=lambda layout: len(layout.shape))


def _calibrated(combination: Combination, terms: Terms, settings: ModuleSettings) -> Combination:
    """The combination with the singular values that several adapters share rescaled, where that is asked for."""
    from loratools.algebra.calibration import calibrated, dense_svd
    from loratools.algebra.lowrank import Factors, Framed, decompose, truncate

    if settings.calibrate != "svc":
        return combination
    if isinstance(combination, (Factors, Framed)):
        core = decompose(combination)
        svd = core.leading(len(core.s))
    else:
        svd = dense_svd(combination)
    return truncate(calibrated(svd, terms.factors), len(svd.s))


def _normed(combination: Combination, terms: Terms, settings: ModuleSettings) -> Combination:
    """The combination at the norm `sum of |weight| |delta|` over the adapters, where that is asked for."""
    from loratools.algebra.lowrank import Factors, Framed, norm

    if not settings.norm_match:
        return combination
    target_norm = math.fsum(abs(w) * norm(f) for w, f in zip(terms.weights, terms.factors, strict=True))
    if isinstance(combination, Framed):
        present = float(combination.core.norm())
        return replace(combination, core=combination.core * (target_norm / present)) if present else combination
    if isinstance(combination, Factors):
        present = norm(combination)
        if not present or present == target_norm:
            return combination
        return Factors(combination.b * (target_norm / present), combination.a)
    present = float(combination.norm())
    return combination * (target_norm / present) if present else combination
