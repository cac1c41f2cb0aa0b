"""SCE: keep the entries in which the deltas differ most, weight each delta by its energy there, erase minorities.

Of `t_i = w_i dW_i` the share `density` of entries with the largest variance over the adapters is kept; each `t_i`
weighs `c_i`, its mean square there as a share of all; entries whose sign is not that of the sum are erased, and the
rest is averaged: `dW = sum c_i t_i / sum c_i`. Wan et al., 2024, "FuseChat", https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Terms
from loratools.methods.common.elementwise import SPACE, density
from loratools.methods.common.elementwise import space as space_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Try it for fine-tunes of one base that differ in few entries, where their values instead of your weights "
        "should decide how much each counts."
    ),
    avoid=(
        "Avoid it if the given weights should decide the strength of each adapter, or if the result must stay "
        "low rank without space=core."
    ),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=False, keeps_one=False)
OPTIONS = (density(0.1), SPACE)


def combine(terms: Terms, *, density: float, space: str) -> Combination:
    import torch

    from loratools.algebra.sparsify import threshold_of

    matrices = space_of(terms, space)
    least = 0.0
    if density < 1:
        spread = matrices.by_blocks(lambda blocks: torch.stack(list(blocks)).var(dim=0, correction=0))
        count = int(density * int((spread != 0).sum()))
        least = threshold_of(spread, count)

    def selected(blocks: Sequence[Tensor]) -> Tensor:
        stack = torch.stack(list(blocks))
        return stack if density >= 1 else stack * (stack.var(dim=0, correction=0) >= least)

    energies = torch.zeros(len(terms), dtype=torch.float64)
    for start, stop in matrices.ranges():
        blocks = [matrices.rows(i, start, stop) for i in range(matrices.count)]
        energies += selected(blocks).square().sum(dim=(1, 2))
    # Only the ratios of the weights matter.
    weights = (energies / energies.max() if energies.max() > 0 else torch.ones_like(energies)).view(-1, 1, 1)

    def merge(blocks: Sequence[Tensor]) -> Tensor:
        stack = selected(blocks)
        agree = (stack.sign() == stack.sum(dim=0).sign()) & (stack != 0)
        total = (weights * agree).sum(dim=0)
        merged: Tensor = (weights * stack * agree).sum(dim=0) / torch.where(total > 0, total, 1.0)
        return merged

    return matrices.back(matrices.by_blocks(merge))
