"""How large the modules of an extraction may become: a rule for each, and limits on all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.ops.lowrank.header_size import header_bytes
from loratools.ops.lowrank.limit import Limit
from loratools.tensors.dtypes import DTYPE_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.rank_rules import RankRule

# A singular value counts as more than noise from this multiple of the edge on: the largest of a random matrix lies a
# little to either side of it (Tracy and Widom).
ABOVE_EDGE = 1.02
# If only the total is limited, each module is first decomposed to this multiple of the rank that all could have.
GENEROUS = 3
_LEAST_SEARCH_RANK = 16


@dataclass(frozen=True)
class RankPolicy:
    """What is asked of each module, by a `limit` or by the edge of its noise, and limits of all modules together.

    max_size is of the file of weights, in bytes; max_params of everything stored in it.
    """

    limit: Limit
    noise_edge: bool = False
    max_size: int | None = None
    max_params: int | None = None

    def __post_init__(self) -> None:
        if self.noise_edge and replace(self.limit, max_rank=None).is_given:
            raise UsageError("--noise-edge and another rule for the rank exclude each other", hint="give one of them")
        for name in ("max_size", "max_params"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
        if not (self.limit.is_given or self.noise_edge or self.limits_all):
            raise UsageError(
                "no rank to extract",
                hint="give --rank, --energy, --error, --noise-edge, --max-size or --max-params; "
                "'loratools spectrum TUNED --base BASE' shows what each rank would keep",
            )

    @property
    def limits_all(self) -> bool:
        """Whether modules must be seen together before any has its rank."""
        return self.max_size is not None or self.max_params is not None

    def planned(self, smaller: int) -> int | None:
        """The rank of a module with this smaller side; None if its values decide."""
        return None if self.limits_all or self.noise_edge else self.limit.planned(smaller)

    def most(self, smaller: int) -> int:
        """No module of this smaller side gets a higher rank."""
        return min(smaller, self.limit.rank or smaller, self.limit.max_rank or smaller)

    def rule(self, smaller: int, edge: float, search_rank: int | None = None) -> RankRule:
        """What chooses the rank of a module with this smaller side and this edge of noise; at most `search_rank`."""
        from loratools.algebra.rank_rules import Above, AtMost, Fixed

        most = min(self.most(smaller), search_rank or smaller)
        by_values = Above(ABOVE_EDGE * edge) if self.noise_edge else self.limit.loss
        return Fixed(most) if by_values is None else AtMost(by_values, most)

    def initial_search_rank(self, costs: Sequence[int], dtype: str) -> int:
        """The rank up to which modules are decomposed before the limits of all are shared out.

        costs: parameters of one unit of rank, of all modules that may have changed.
        """
        budget = min(self.max_params or _ENDLESS, (self.max_size or _ENDLESS) * 8 // DTYPE_BITS[dtype])
        return max(_LEAST_SEARCH_RANK, GENEROUS * budget // max(1, sum(costs)))

    def shared_out(
        self,
        names: Sequence[str],
        spectra: Sequence[Tensor],
        costs: Sequence[int],
        replaced: Mapping[str, int],
        dtype: str,
        replaced_bytes: int,
    ) -> list[int]:
        """The ranks of modules with these spectra (as far as their rules allow) within the limits of all.

        replaced: parameters of what is stored whole, by name.

        Raises:
            UsageError: Rank 1 wherever something changed is too large already.
        """
        from loratools.algebra.allocation import allocate, least_budget

        chosen = [len(s) for s in spectra]
        for option, budget, per_unit, fixed in (
            ("--max-params", self.max_params, 1, sum(replaced.values())),
            ("--max-size", self.max_size, DTYPE_BITS[dtype] // 8, replaced_bytes + header_bytes(names, [*replaced])),
        ):
            if budget is None:
                continue
            units = [cost * per_unit for cost in costs]
            least = fixed + least_budget(spectra, units)
            if budget < least:
                fixed_part = f", {_amount(option, fixed)} of it for what is stored whole and for names" if fixed else ""
                raise UsageError(
                    f"{option} {_amount(option, budget)} is too little: rank 1 in each of {len(names)} changed modules "
                    f"takes {_amount(option, least)}{fixed_part}",
                    hint="allow more, or choose modules with --include and --exclude",
                )
            ranks = allocate(spectra, units, budget - fixed, maximum=chosen)
            chosen = [min(a, b) for a, b in zip(chosen, ranks, strict=True)]
        return chosen


_ENDLESS = 1 << 62


def _amount(option: str, value: int) -> str:
    return f"{value:,} {'bytes' if option == '--max-size' else 'parameters'}"
