"""The exact weighted sum of the deltas, also called task arithmetic.

`dW = sum_i w_i * s_i * B_i @ A_i`: factors side by side, so ranks add up and nothing is lost. A negative weight takes a
task away. Ilharco et al., 2023, "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Laws, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

LAWS = Laws(order=True, gauge=True, turns=True, alone=True)


def combine(terms: Terms) -> Combination:
    from loratools.algebra.lowrank import concatenate

    if terms.weights == (1.0,):
        return terms.factors[0]
    return concatenate(list(zip(terms.weights, terms.factors, strict=True)))
