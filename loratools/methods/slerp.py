"""Interpolation of two deltas along the arc between them instead of the straight line.

With `t = w_2 / (w_1 + w_2)` and the angle `theta` between the deltas,
`dW = (w_1 + w_2) * (sin((1 - t) theta) dW_1 + sin(t theta) dW_2) / sin(theta)`; a straight line where they point the
same way or opposite ways, to 1e-4. Weights that sum to 1 give the interpolation; others scale it. It is a linear
combination, so it is exact in the factors. Shoemake, 1985, "Animating rotation with quaternion curves".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.methods import Advice, Laws, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use=("Use it for exactly two adapters, such as two styles, to get a point between them that keeps their strength."),
    avoid=("Avoid it for three or more adapters (use karcher), or if you want both at full strength (use linear)."),
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True, negative_weights=False)

# Below this angle the arc equals the straight line to nine digits, and the quotient of two small sines is inaccurate.
_STRAIGHT = 1e-4


def combine(terms: Terms) -> Combination:
    from loratools.algebra.lowrank import concatenate

    if len(terms) > 2:
        raise UsageError(
            f"slerp takes two adapters, and {len(terms)} have '{terms.name}'",
            hint="--method karcher is the same for any number",
        )
    if terms.weights == (1.0,):
        return terms.factors[0]
    if len(terms) == 1:
        return concatenate([(terms.weights[0], terms.factors[0])])
    total = math.fsum(terms.weights)
    t = terms.weights[1] / total
    lengths = terms.gram.diagonal().clamp(min=0).sqrt()
    product = float(lengths[0] * lengths[1])
    cosine = float(terms.gram[0, 1]) / product if product else 0.0
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    if min(theta, math.pi - theta) < _STRAIGHT:
        shares = (1 - t, t)
    else:
        shares = (math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta))
    return concatenate([(total * share, f) for share, f in zip(shares, terms.factors, strict=True)])
