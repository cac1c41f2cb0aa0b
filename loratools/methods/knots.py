"""KnOTS: align the deltas by one SVD of all of them side by side, and merge their right parts by TIES.

`[t_1 ... t_T] = U S [V_1 ... V_T]` of the weighted deltas; `V` is what TIES (or the sum) makes of the `V_i`, and
`dW = U S V`. The paper decomposes a dense matrix of size (out, T in); here it is the SVD of the small cores, and the
result is the same. It has the rank of all deltas together. Stoica et al., 2025, https://arxiv.org/abs/2410.19735.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.elementwise import AVERAGE, JOIN, MAJORITY, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Try it to get TIES for LoRA adapters at small cost, in coordinates that all adapters share.",
    avoid=(
        "Avoid it if you need the numbers of TIES on whole weights (ties with space=full), or if the "
        "plain sum is good enough, which linear gives exactly."
    ),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (density(0.2), replace(JOIN, default="ties"), MAJORITY, AVERAGE)


def combine(terms: Terms, *, density: float, join: str, majority: str, average: str) -> Combination:
    from loratools.algebra.sparsify import largest

    return sparse_sum(
        terms, "knots", lambda blocks, _: largest(blocks, density), join=join, majority=majority, average=average
    )
