"""TIES: keep the largest entries of each delta, elect a sign for each entry, average those that agree.

`t_i = w_i dW_i`, trimmed to its share `density` of largest magnitudes; `g = sign(sum_i t_i)`; `dW` is the mean of those
`t_i` whose sign is `g`. Weights are applied first, so that they take part in the election (PEFT's do not). The paper's
lambda is a common factor of the weights. Yadav et al., 2023, https://arxiv.org/abs/2306.01708.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.elementwise import AVERAGE, MAJORITY, SPACE, density, sparse_sum

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Try it for adapters of different tasks that pull the same entries in opposite directions, and measure it "
        "against linear."
    ),
    avoid=(
        "Avoid it if the result must be exact or low rank: with space=full it is dense, and --rank truncates "
        "it. Use linear, or space=core."
    ),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (density(0.2), MAJORITY, AVERAGE, SPACE)


def combine(terms: Terms, *, density: float, majority: str, average: str, space: str) -> Combination:
    from loratools.algebra.sparsify import largest

    return sparse_sum(
        terms, space, lambda blocks, _: largest(blocks, density), join="ties", majority=majority, average=average
    )
