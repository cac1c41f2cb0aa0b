"""PEFT's `ties` and `ties_svd`, for the same numbers: weights do not vote, A and B merge separately. Prefer `ties`.

Largest entries, election and mean as in TIES (https://arxiv.org/abs/2306.01708), but the signs are elected before the
adapters are weighted, and with `on=factors` the A's and the B's are treated as if they were weights of the model: an
entry of A means nothing by itself, and their product holds cross terms. `on=deltas` is `ties_svd`, which needs --rank.
PEFT 0.21, `LoraModel.add_weighted_adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.peft import DENSITY, MAJORITY, ON

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to reproduce the numbers of PEFT's `ties` and `ties_svd`.",
    avoid="Avoid it in new work: it treats entries of A and B as if they were weights of the model. Use ties.",
)
LAWS = Laws(order_free=True, ignores_split=False, rotation_equivariant=False, keeps_one=False)
OPTIONS = (DENSITY, MAJORITY, ON)


def combine(terms: Terms, *, density: float, majority: str, on: str) -> Combination:
    from loratools.methods.common import peft

    return peft.merged(terms, on, peft.by_magnitude(density), peft.elected(majority))
