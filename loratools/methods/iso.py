"""Iso-C and Iso-CTS: the singular directions of the sum, all with the mean singular value.

Iso-C: `sum_i w_i dW_i = U S V^T`, `dW = mean(S) U V^T`. The mean is over the nonzero singular values; the published
code divides by `min(out, in)`, which only makes the result smaller for a LoRA. Iso-CTS (`common` below 1): only the
share `common` of those directions is used; the rest are, from each adapter in equal parts, the leading directions
outside of the common ones. All are made orthonormal by polar factors, with the mean of all their singular values. The
paper's share is 0.8. The spectrum is flat, so that a lower rank loses in proportion. Marczak et al., 2025,
https://arxiv.org/abs/2502.04959.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Option, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use=(
        "Try it for many adapters of similar tasks, where a few strong directions would drown the others, and "
        "search for a common factor of the weights."
    ),
    avoid="Avoid it if a small rank is needed: the spectrum is flat, and a lower rank loses in proportion.",
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=False)
OPTIONS = (
    Option("common", 1.0, "share of the directions that come from the sum: 1 is Iso-C", low=0, high=1, open_low=True),
)


def combine(terms: Terms, *, common: float) -> Combination:
    import torch

    from loratools.algebra.lowrank import Framed
    from loratools.methods.common.spectral import cut, nearest_orthonormal

    frame = terms.shared
    total = torch.stack(list(frame.cores)).sum(dim=0)
    together = cut(total)
    rank = len(together.s)
    if not rank:
        return Framed(frame.left, torch.zeros_like(total), frame.right)
    shared_rank = max(1, round(common * rank))
    each = (rank - shared_rank) // len(terms)
    us, ss, vs = [together.u[:, :shared_rank]], [together.s[:shared_rank]], [together.vt[:shared_rank].mT]
    if each:
        for core in frame.cores:
            individual = cut(core - us[0] @ (us[0].mT @ core), each)
            us, ss, vs = [*us, individual.u], [*ss, individual.s], [*vs, individual.vt.mT]
    u, v = (nearest_orthonormal(torch.cat(parts, dim=1)) for parts in (us, vs))
    return Framed(frame.left, torch.cat(ss).mean() * (u @ v.mT), frame.right)
