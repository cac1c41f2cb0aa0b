"""PEFT's `dare_linear`, `dare_ties` and their `_svd`, for the same numbers: A and B are merged separately. Prefer
`dare`.

Entries of each A and each B are dropped at random, the others divided by `density`; `join=linear` sums them,
`join=ties` elects signs first, without the weights. The product holds cross terms, and noise times noise. `on=deltas`
is `dare_linear_svd` or `dare_ties_svd`; it needs --rank. PEFT draws its random numbers from torch's global state, so
its result cannot be repeated; here they depend on --seed. PEFT 0.21, `LoraModel.add_weighted_adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.elementwise import JOIN
from loratools.methods.common.peft import DENSITY, MAJORITY, ON

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to understand or imitate the numbers of PEFT's `dare_linear` and `dare_ties`.",
    avoid=(
        "Avoid it in new work: noise in both factors made the model worse than without an adapter in our "
        "measurements. Use linear, or dare."
    ),
)
LAWS = Laws(order_free=False, ignores_split=False, rotation_equivariant=False, keeps_one=False)
OPTIONS = (DENSITY, JOIN, MAJORITY, ON)


def combine(terms: Terms, *, density: float, join: str, majority: str, on: str) -> Combination:
    from loratools.methods.common import peft

    joined = peft.summed if join == "linear" else peft.elected(majority)
    return peft.merged(terms, on, peft.by_chance(density), joined)
