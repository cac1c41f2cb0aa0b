"""Keep the largest entries of each delta, and add up what is left.

`dW = sum_i trim(w_i dW_i)`, each trimmed to its share `density` of largest magnitudes. The pruning of TIES (Yadav et
al., 2023, https://arxiv.org/abs/2306.01708) without its election, which is `join=ties`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Laws, Terms
from loratools.methods.common.elementwise import JOIN, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

LAWS = Laws(order=True, gauge=True, turns=False, alone=False)
OPTIONS = (density(0.5), JOIN, SPACE)


def combine(terms: Terms, *, density: float, join: str, space: str) -> Combination:
    from loratools.algebra.sparsify import largest

    return sparse_sum(terms, space, lambda blocks, _: largest(blocks, density), join=join)
