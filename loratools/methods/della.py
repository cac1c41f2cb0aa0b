"""DELLA: drop entries of each delta at random, small ones of a row more often, and add up or elect.

MAGPRUNE: in each row the entry of rank `k` among `n` by magnitude is kept with probability
`density - spread + 2 spread k / (n - 1)` and divided by it. Then signs are elected as by TIES, or with `join=linear`
all are added. Deep et al., 2024, https://arxiv.org/abs/2406.11617.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.methods import Advice, Laws, Option, Terms
from loratools.methods.common.elementwise import JOIN, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to repeat a published recipe that names DELLA.",
    avoid=(
        "Avoid it if the result must not depend on a seed or on the order of the adapters, or must stay low rank "
        "without space=core."
    ),
)
LAWS = Laws(order_free=False, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (
    density(0.5),
    Option("spread", 0.15, "how far the probability goes below and above the density", low=0, high=0.5),
    replace(JOIN, default="ties"),
    SPACE,
)


def combine(terms: Terms, *, density: float, spread: float, join: str, space: str) -> Combination:
    from loratools.algebra.sparsify import at_random_by_rank

    if not density - spread > 0 or density + spread > 1:
        raise UsageError(f"density {density:g} with spread {spread:g} leaves the probabilities from 0 to 1")
    return sparse_sum(terms, space, lambda _, i: at_random_by_rank(density, spread, terms.generator(i)), join=join)
