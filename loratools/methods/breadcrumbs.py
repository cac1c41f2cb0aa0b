"""Model Breadcrumbs: drop the largest entries of each delta as outliers and the smallest as noise, add the rest.

Of each `w_i dW_i`, the share `outliers` of the largest magnitudes is dropped, then the smallest until the share
`density` remains. Davari and Belilovsky, 2024, https://arxiv.org/abs/2312.06795. `join=ties` then elects signs as TIES
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Option, Terms
from loratools.methods.common.elementwise import JOIN, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Try it for deltas with a few extreme entries and much small noise, such as those of full fine-tunes.",
    avoid="Avoid it if the result must stay low rank, unless space=core is set.",
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (
    density(0.9),
    Option("outliers", 0.01, "share of the largest entries that is dropped", low=0, high=1),
    JOIN,
    SPACE,
)


def combine(terms: Terms, *, density: float, outliers: float, join: str, space: str) -> Combination:
    from loratools.algebra.sparsify import without_outliers

    return sparse_sum(terms, space, lambda blocks, _: without_outliers(blocks, density, outliers), join=join)
