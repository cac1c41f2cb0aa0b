"""What the values of an adapter say, as far as rules need it: numbers, never the values themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from loratools.checks.common.observation import Unobserved


class MeasuredModule(NamedTuple):
    """The values of one update.

    Attributes:
        non_finite: How many of its stored values are NaN or infinite.
        subnormal_share: The share of its stored values other than 0 that are below the smallest normal number of their
            dtype, where they are rounded coarsely and where some devices take them for 0.
        rank: The rank that it is stored with; None if its kind has none.
        numerical_rank: How many of its singular values are above the noise of rounding; None if it has no factors.
        norm: The Frobenius norm of the delta, scale included; None if it has no factors, or values not finite.
        size: How many entries the delta has.
        rows: How many rows B has; None if it has no factors.
        zero_rows: How many of these are exact zeros.
    """

    non_finite: int = 0
    subnormal_share: float = 0.0
    rank: int | None = None
    numerical_rank: int | None = None
    norm: float | None = None
    size: int = 0
    rows: int | None = None
    zero_rows: int = 0


def without_factors(modules: Mapping[str, MeasuredModule] | None) -> Iterator[Unobserved]:
    """The modules whose updates have no factors: those that depend on the base (DoRA, OFT), and dense ones."""
    names = tuple(name for name, module in (modules or {}).items() if module.norm is None and not module.non_finite)
    if names:
        yield Unobserved("their updates are not known as products of two factors", names)
