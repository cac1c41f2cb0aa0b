"""Keep the largest entries of each delta, and add them.

`dW = sum_i trim(w_i dW_i)`, each trimmed to its share `density` of largest magnitudes. The pruning of TIES (Yadav et
al., 2023, https://arxiv.org/abs/2306.01708) without its election, which is `join=ties`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.elementwise import JOIN, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to make deltas sparse before they are added, so that each adapter touches few weights.",
    avoid="Avoid it if you do not need sparse deltas: linear keeps everything and is exact.",
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (density(0.5), JOIN, SPACE)


def combine(terms: Terms, *, density: float, join: str, space: str) -> Combination:
    from loratools.algebra.sparsify import largest

    return sparse_sum(terms, space, lambda blocks, _: largest(blocks, density), join=join)
