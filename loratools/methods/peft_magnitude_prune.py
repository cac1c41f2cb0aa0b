"""PEFT's `magnitude_prune`, with or without `_svd`, for the same numbers: A and B merge separately. Prefer `magnitude`.

The largest entries of each A and each B are kept, and the A's and the B's are summed separately, which leaves cross
terms. `on=deltas` is `magnitude_prune_svd`, which has none; it needs --rank. PEFT 0.21,
`LoraModel.add_weighted_adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.peft import DENSITY, ON

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to reproduce the numbers of PEFT's `magnitude_prune`.",
    avoid="Avoid it in new work: its cross terms belong to no adapter. Use magnitude.",
)
LAWS = Laws(order_free=True, ignores_split=False, rotation_equivariant=False, keeps_one=False)
OPTIONS = (DENSITY, ON)


def combine(terms: Terms, *, density: float, on: str) -> Combination:
    from loratools.methods.common import peft

    return peft.merged(terms, on, peft.by_magnitude(density), peft.summed)
