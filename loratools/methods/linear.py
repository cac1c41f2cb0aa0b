"""The exact weighted sum of the deltas, also called task arithmetic.

`dW = sum_i w_i * s_i * B_i @ A_i`: factors side by side, so ranks add up and nothing is lost. A negative weight takes a
task away. Ilharco et al., 2023, "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors


def combine(factors: Sequence[tuple[float, Factors]]) -> Factors:
    from loratools.algebra.lowrank import concatenate

    match factors:
        case [(1.0, alone)]:
            return alone
        case _:
            return concatenate(factors)
