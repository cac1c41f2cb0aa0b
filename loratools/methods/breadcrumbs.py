"""Model Breadcrumbs: drop the largest entries of each delta as outliers and the smallest as noise, add up the rest.

Of each `w_i dW_i` the share `outliers` of largest magnitudes is dropped, then the smallest until the share `density` is
left. Davari and Belilovsky, 2024, https://arxiv.org/abs/2312.06795. TIES' election afterwards is `join=ties`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Laws, Option, Terms
from loratools.methods.common.elementwise import JOIN, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

LAWS = Laws(order=True, gauge=True, turns=False, alone=False)
OPTIONS = (
    density(0.9),
    Option("outliers", 0.01, "share of the largest entries that is dropped", low=0, high=1),
    JOIN,
    SPACE,
)


def combine(terms: Terms, *, density: float, outliers: float, join: str, space: str) -> Combination:
    from loratools.algebra.sparsify import without_outliers

    return sparse_sum(terms, space, lambda blocks, _: without_outliers(blocks, density, outliers), join=join)
