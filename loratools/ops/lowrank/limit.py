"""How small a module is to become, as a person asks for it: by a rank, an energy, an error or one of kohya's rules."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.rank_rules import Lost, RankRule

# Named after kohya's, and each the smallest rank that it asks for; the newest of kohya's does as well.
RULES = ("sv_ratio", "sv_cumulative", "sv_fro")


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
        options = [f"--{name}" for name in ("rank", "energy", "error", "rule") if getattr(self, name) is not None]
        if len(options) > 1:
            raise UsageError(f"{' and '.join(options)} exclude each other", hint="give one of them")
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
            _ensure_rule(*self.rule)

    @property
    def is_given(self) -> bool:
        return any(value is not None for value in (self.rank, self.energy, self.error, self.rule, self.max_rank))

    def planned(self, rank: int) -> int | None:
        """The rank that a module of `rank` ends with; None if its values decide."""
        if (self.energy, self.error, self.rule) != (None, None, None):
            return None
        return min([rank, *(r for r in (self.rank, self.max_rank) if r is not None)])

    def chosen(self, s: Tensor, shape: tuple[int, int]) -> int:
        """The rank to cut a matrix with singular values `s` at; at least 1, since formats have no module of rank 0."""
        from loratools.algebra.rank_rules import named_rank, rank_for_energy, rank_for_error

        if self.energy is not None:
            rank = rank_for_energy(s, self.energy, shape=shape)
        elif self.error is not None:
            rank = rank_for_error(s, self.error, shape=shape)
        elif self.rule is not None:
            rank = named_rank(*self.rule, s)
        else:
            rank = len(s) if self.rank is None else self.rank
        return max(1, min(rank, len(s), self.max_rank or rank))

    @property
    def loss(self) -> Lost | None:
        """The share of the squared norm that may be lost; None if another rule than that chooses the rank."""
        from loratools.algebra.rank_rules import lost_for_energy, lost_for_error

        if self.energy is not None:
            return lost_for_energy(self.energy)
        return None if self.error is None else lost_for_error(self.error)

    def rank_rule(self) -> RankRule | None:
        """The same for a decomposition that is found step by step; None if it needs all singular values."""
        from loratools.algebra.rank_rules import AtMost, Fixed

        if (loss := self.loss) is not None:
            if loss.needs_all:
                return None
            return loss if self.max_rank is None else AtMost(loss, self.max_rank)
        if self.rule is None and self.is_given:
            return Fixed(min(r for r in (self.rank, self.max_rank) if r is not None))
        return None


def _ensure_rule(name: str, value: float) -> None:
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
