"""The exact weighted sum of the deltas, also called task arithmetic.

`dW = sum_i w_i * s_i * B_i @ A_i`: factors are concatenated, so ranks add up and nothing is lost. A negative weight
subtracts a task. Ilharco et al., 2023, "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Start with it: it is exact, its result is predictable, and its report of overlaps shows whether another "
        "method has anything to gain."
    ),
    avoid=(
        "Compare wudi, tsv and --calibrate svc with it if adapters overlap strongly, so that each disturbs the others."
    ),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True)


def combine(terms: Terms) -> Combination:
    from loratools.algebra.lowrank import concatenate

    if terms.weights == (1.0,):
        return terms.factors[0]
    return concatenate(list(zip(terms.weights, terms.factors, strict=True)))
