"""Compress then merge: common rank-r subspaces that fit all adapters best, and the sum within them.

`U` and `V` with `rank` orthonormal columns maximise `sum_i |U^T T_i V|^2`, `T_i = w_i dW_i / |w_i dW_i|`, by
alternating eigenvectors (Ye, 2004, "Generalized low rank approximations of matrices"); then `dW = U (sum_i U^T w_i dW_i
V) V^T`. Every adapter has the same influence on the subspaces, however large its delta; a truncated SVD of the sum
would favour the largest. The paper's own formula for the subspaces could not be checked; this is the objective that it
states. CtM, 2026, https://arxiv.org/abs/2606.03723; joint diagonalisation of Brüel-Gabrielsson et al., 2024, "Compress
then serve", https://arxiv.org/abs/2407.00066.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Option, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Use it where the result must have one small rank and every adapter is to weigh the same in it, however "
        "large its delta."
    ),
    avoid=(
        "Avoid it where the rank is free (linear is exact and simpler), or where large adapters may weigh more "
        "(linear with --rank has the smaller error)."
    ),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True)
OPTIONS = (
    Option("rank", 0, "rank of the result; 0: the largest among the adapters", low=0),
    Option("sweeps", 50, "largest number of rounds of the alternation", low=1),
)
# The iteration stops after a round that gains less than this share of the objective.
_ENOUGH = 1e-14


def combine(terms: Terms, *, rank: int, sweeps: int) -> Combination:
    import torch

    from loratools.algebra.lowrank import Framed

    frame = terms.shared
    rank = min(rank or max(f.rank for f in terms.factors), *frame.cores[0].shape)
    stack = torch.stack(list(frame.cores))
    sizes = torch.linalg.matrix_norm(stack).view(-1, 1, 1)
    units = stack / torch.where(sizes > 0, sizes, 1.0)
    u, v = _subspaces(units, rank, sweeps)
    total = stack.sum(dim=0)
    return Framed(frame.left.rotated(u), u.mT @ total @ v, frame.right.rotated(v))


def _subspaces(units: Tensor, rank: int, sweeps: int) -> tuple[Tensor, Tensor]:
    import torch

    def leading(gram: Tensor) -> tuple[Tensor, float]:
        values, vectors = torch.linalg.eigh(gram)
        return vectors[:, -rank:].flip(1), float(values[-rank:].sum())

    v, _ = leading((units.mT @ units).sum(dim=0))
    before = 0.0
    for _ in range(sweeps):
        half = units @ v
        u, _ = leading((half @ half.mT).sum(dim=0))
        half = units.mT @ u
        v, captured = leading((half @ half.mT).sum(dim=0))
        if captured <= before * (1 + _ENOUGH):
            break
        before = captured
    return u, v
