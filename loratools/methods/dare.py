"""DARE: drop entries of each delta at random, divide the others by the share that is kept, add up.

`dW = sum_i m_i w_i dW_i / density`, with `m_i` independent and 1 with probability `density`. The expected result is the
plain sum; the added noise has variance `(1 - density) / density * dW^2` in every entry, spread over all directions.
Truncating the sum to a rank afterwards only removes some of that noise: with `join=linear` the result is the linear one
with noise. Yu et al., 2024, https://arxiv.org/abs/2311.03099. `join=ties` elects signs afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.elementwise import JOIN, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it to repeat a published recipe that names DARE.",
    avoid="Avoid it elsewhere: with join=linear the result is that of linear with noise added.",
)
LAWS = Laws(order_free=False, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (density(0.5), JOIN, SPACE)


def combine(terms: Terms, *, density: float, join: str, space: str) -> Combination:
    from loratools.algebra.sparsify import at_random

    return sparse_sum(terms, space, lambda _, i: at_random(density, terms.generator(i)), join=join)
