"""TSV-M: the singular vectors of all deltas, made orthogonal to one another, with their singular values.

`w_i dW_i = U_i S_i V_i^T`; with `U = [U_1 ... U_T]` and `V = [V_1 ... V_T]` replaced by the nearest orthonormal
matrices (polar factors), `dW = U diag(S) V^T`. Only singular values above rounding level take part: those of a LoRA end
at its rank, and the arbitrary vectors that a full SVD gives beyond it would rotate the polar factors. `keep` truncates
each delta further; the paper keeps `min(out, in) / T`. Ranks add up. Gargiulo et al., 2025,
https://arxiv.org/abs/2412.00081.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Option, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Try it if the overlap of adapters is far above chance, so that their singular directions disturb each other."
    ),
    avoid=("Avoid it if overlaps are at their random value: it then changes almost nothing, and linear is simpler."),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True)
OPTIONS = (Option("keep", 0, "singular directions of each adapter that take part; 0: all of them", low=0),)


def combine(terms: Terms, *, keep: int) -> Combination:
    import torch

    from loratools.algebra.lowrank import Framed
    from loratools.methods.common.spectral import cut, nearest_orthonormal

    if terms.weights == (1.0,) and not keep:
        return terms.factors[0]
    frame = terms.shared
    parts = [cut(core, keep or None) for core in frame.cores]
    u = nearest_orthonormal(torch.cat([p.u for p in parts], dim=1))
    v = nearest_orthonormal(torch.cat([p.vt.mT for p in parts], dim=1))
    return Framed(frame.left, (u * torch.cat([p.s for p in parts])) @ v.mT, frame.right)
