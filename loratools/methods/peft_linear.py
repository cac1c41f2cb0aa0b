"""PEFT's `linear`, for the same numbers: A and B are summed separately, which leaves cross terms. Prefer `linear`.

`B = sum_i sqrt|w_i s_i| B_i`, `A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i`: besides the sum of the deltas the product
holds `B_i A_j` for every two adapters, as large as the deltas themselves, and with a negative weight their signs are
arbitrary. Ranks must be equal. PEFT 0.21, `LoraModel.add_weighted_adapter`; its issue 3004.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to reproduce the numbers of PEFT's `linear`.",
    avoid="Avoid it in new work: its cross terms are as large as the deltas themselves. Use linear.",
)
LAWS = Laws(order_free=True, ignores_split=False, rotation_equivariant=True, keeps_one=True)


def combine(terms: Terms) -> Combination:
    from loratools.methods.common import peft

    return peft.merged(terms, "factors", peft.everything, peft.summed)
