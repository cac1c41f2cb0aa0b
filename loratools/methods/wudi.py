"""WUDI: the delta that differs least from each adapter's on the inputs that this adapter reacts to.

`min over dW of sum_i |(dW - t_i) t_i^T|^2 / |t_i|^2`, with `t_i = w_i dW_i`. The paper descends by Adam; it is a
least-squares problem, solved here in closed form: with `G_i = t_i^T t_i / |t_i|^2`, `dW = (sum_i t_i G_i + mu S) (sum_i
G_i + mu I)^-1`, `S = sum_i t_i`, `mu = ridge * trace(sum_i G_i) / p`. As `ridge` goes to 0 no adapter disturbs another,
as long as their row spaces are independent; the price is a larger delta. Cheng et al., 2025,
https://arxiv.org/abs/2503.08099; the closed form is that of RegMean (Jin et al., 2023,
https://arxiv.org/abs/2212.09849) with `G_i` for the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods import Advice, Laws, Option, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Try it for adapters that share many inputs, where each should act on its own inputs as if it were alone.",
    avoid=(
        "Avoid it if the result must stay small: it grows if row spaces are nearly the same, unless `ridge` "
        "is raised. If overlaps are at their random value, linear does the same."
    ),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True)
OPTIONS = (
    Option(
        "ridge",
        0.01,
        "pull towards the plain sum, as a share of the mean diagonal of the Gram matrix",
        low=0,
        open_low=True,
    ),
)


def combine(terms: Terms, *, ridge: float) -> Combination:
    import torch

    from loratools.algebra.lowrank import Framed

    if terms.weights == (1.0,):
        return terms.factors[0]
    frame = terms.shared
    total = torch.stack(list(frame.cores)).sum(dim=0)
    squares = [core.square().sum() for core in frame.cores]
    grams = [core.mT @ core / torch.where(s > 0, s, 1.0) for core, s in zip(frame.cores, squares, strict=True)]
    gram = torch.stack(grams).sum(dim=0)
    size = gram.shape[0]
    mu = ridge * float(gram.trace()) / size
    if not mu:
        return Framed(frame.left, total, frame.right)
    right_side = torch.stack([core @ g for core, g in zip(frame.cores, grams, strict=True)]).sum(dim=0) + mu * total
    # M (gram + mu I) = right_side; symmetric and positive.
    solution = torch.cholesky_solve(
        right_side.mT, torch.linalg.cholesky(gram + mu * torch.eye(size, dtype=gram.dtype))
    ).mT
    return Framed(frame.left, solution, frame.right)
