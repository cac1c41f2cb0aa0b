"""The mean direction of any number of deltas on the sphere, with the weighted sum of their norms.

The direction `u` that minimises `sum_i w_i angle(u, dW_i / |dW_i|)^2`, by Riemannian gradient steps from the mean of
the directions, and `dW = (sum_i w_i |dW_i|) u`. Every step is a linear combination of the deltas, so that only their
inner products are computed with, and the result is exact in the factors. Karcher, 1977, "Riemannian center of mass and
mollifier smoothing".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.methods import Advice, Laws, Option, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it for three or more adapters if you want a mean that does not shrink when they disagree.",
    avoid="Avoid it if you want the full sum of all skills, or if a weight is negative: use linear.",
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True, negative_weights=False)
OPTIONS = (
    Option("steps", 100, "largest number of steps of the iteration", low=1),
    Option("tolerance", 1e-12, "the iteration stops at steps below this angle, in radians", low=0),
)


def combine(terms: Terms, *, steps: int, tolerance: float) -> Combination:
    import torch

    from loratools.algebra.lowrank import concatenate

    if terms.weights == (1.0,):
        return terms.factors[0]
    lengths = terms.gram.diagonal().clamp(min=0).sqrt()
    nonzero = lengths > 0
    weights = torch.tensor(terms.weights, dtype=torch.float64)
    if not nonzero.any():
        return concatenate(list(zip(terms.weights, terms.factors, strict=True)))
    scale = torch.where(nonzero, lengths, 1.0)
    # Directions as coefficients of the unit deltas; their inner products are cosines.
    cosines = terms.gram / scale[:, None] / scale
    shares = torch.where(nonzero, weights, 0.0)
    shares = shares / shares.sum()

    def length(x: torch.Tensor) -> float:
        return math.sqrt(max(0.0, float(x @ cosines @ x)))

    mean = shares.clone()
    if length(mean) < 1e-8:
        raise UsageError(
            f"the deltas of '{terms.name}' point in opposite directions, and have no mean direction",
            hint="choose other weights, or --method linear",
        )
    mean /= length(mean)
    for _ in range(steps):
        towards = (cosines @ mean).clamp(-1, 1)
        theta = towards.acos()
        sine = theta.sin()
        pull = torch.where(theta > 1e-9, shares * theta / torch.where(sine > 0, sine, 1.0), shares)
        # The sum of share * (theta / sin theta) * (unit - cos theta * mean).
        tangent = pull - (pull * towards).sum() * mean
        size = length(tangent)
        if size <= tolerance:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean /= length(mean)
    total = float((weights * lengths).sum())
    coefficients = (total * mean / scale).tolist()
    return concatenate(list(zip(coefficients, terms.factors, strict=True)))
