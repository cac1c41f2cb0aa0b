"""FedEx: the mean of the A's times the mean of the B's, with the remainder in a second adapter (`--residual`).

With shares `c_i = w_i / sum w`, `dW = (sum w) (sum_i c_i s_i B_i) (sum_i c_i A_i)`, as servers of federated learning
average factors; the residual `sum_i w_i s_i B_i A_i - dW` makes it exact. Without --residual this is a bad
approximation. Ranks must be equal. Singhal et al., 2024, "FedEx-LoRA", https://arxiv.org/abs/2410.09432.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.methods import Advice, Laws, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Use it for the adapters of one round of federated training, which share their initialisation, together "
        "with --residual, which makes it exact."
    ),
    avoid=(
        "Avoid it for adapters that were trained separately: without --residual the mean of their factors is a bad "
        "approximation of the sum. Use linear."
    ),
)
LAWS = Laws(order_free=True, ignores_split=False, rotation_equivariant=True, keeps_one=True)


def combine(terms: Terms) -> Combination:
    import torch

    from loratools.algebra.lowrank import Factors
    from loratools.methods.common.peft import equal_ranks

    equal_ranks(terms)
    total = math.fsum(terms.weights)
    if not total:
        raise UsageError(f"the weights of '{terms.name}' sum to 0, and have no mean")
    shares = torch.tensor(terms.weights, dtype=torch.float64).view(-1, 1, 1) / total
    b = (shares * torch.stack([f.b for f in terms.factors])).sum(dim=0)
    return Factors(b * total, (shares * torch.stack([f.a for f in terms.factors])).sum(dim=0))


def approximates(terms: Terms) -> Combination:
    """The target of the residual: the exact weighted sum."""
    from loratools.methods import linear

    return linear.combine(terms)
