"""What a combination lost by truncation, as another adapter: the two together are exact."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.errors import UsageError
from loratools.methods import Terms
from loratools.ops.combine.settings import ModuleSettings
from loratools.ops.lowrank.experts import Experts, apart, together, zeros_like
from loratools.ops.lowrank.factors import layout_of
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import Reduced, reduced
from loratools.updates.parts.protocol import Update

# Singular values below this share of the norm are rounding.
_ROUNDING = 1e-12


def lost_update(result: Reduced, terms: Terms, settings: ModuleSettings, name: str, dtype: str) -> Update | None:
    """What must be added to the stored values of a module to have all of it; None if that is rounding.

    Raises:
        UsageError: What is lost has no low rank.
    """
    from loratools.algebra.lowrank import EPS, Factors, concatenate, decompose, numerical_rank, truncate

    approximates = getattr(settings.method, "approximates", None)
    exact = result.target if approximates is None else approximates(terms)
    if not isinstance(exact, Factors):
        raise UsageError(
            f"what is lost of '{name}' is not of low rank, and cannot be written as an adapter",
            hint="work in small coordinates: --set space=core; or leave out --residual",
        )
    difference = concatenate([(1.0, exact), (-1.0, result.factors)])
    core = decompose(difference)
    rank = numerical_rank(core.s, (difference.out_features, difference.in_features), EPS)
    if not rank or float(core.s[0]) <= _ROUNDING * result.stored.norm:
        return None
    # Cancelled terms leave directions that are rounding: as large as the values that were subtracted, times epsilon.
    rank = max(1, int((core.s > _ROUNDING * max(result.stored.norm, float(core.s[0]))).sum()))
    truncated = truncate(core.leading(rank), rank)
    layout = layout_of(result.stored.update)
    return reduced(truncated, Limit(), name, dtype, unchanged=None, unchanged_dtype=None, layout=layout).stored.update


def residual_updates(
    lost: Mapping[str, Update], updates: Mapping[str, Update], fused_experts: Mapping[str, Experts]
) -> dict[str, Update]:
    """What was lost, with experts as one parameter; an expert that lost nothing has zeros there."""
    residual = dict(lost)
    for name in fused_experts:
        fused = updates.get(name)
        if fused is None or fused.as_experts() is None:
            continue
        experts, _ = apart({name: fused})
        if lost.keys() & experts.keys():
            residual |= {expert: zeros_like(update) for expert, update in experts.items() if expert not in lost}
    return together(residual, fused_experts)
