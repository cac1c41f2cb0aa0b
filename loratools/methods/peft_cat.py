"""PEFT's `cat`: concatenated factors. Exact, and the same sum as `linear`, which also stores it better.

`A = [w_1 s_1 A_1; ...]`, `B = [B_1 ...]`: the one combination type of PEFT without an error. PEFT 0.21,
`LoraModel.add_weighted_adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError
from loratools.methods import Advice, Laws, Terms

if TYPE_CHECKING:
    from loratools.methods import Combination

ADVICE = Advice(
    use="Use it if you need the numbers of PEFT's `cat`.",
    avoid="Prefer linear otherwise: it is the same sum, and stores it better.",
)
LAWS = Laws(order_free=True, ignores_split=True, rotation_equivariant=True, keeps_one=True)


def combine(terms: Terms) -> Combination:
    import torch

    from loratools.algebra.lowrank import Factors

    if None in terms.scales:
        raise UnsupportedError(
            f"'{terms.name}' is not a plain pair of factors in every adapter",
            hint="--method linear gives the same delta of any kind of update",
        )
    scales = [s or 0.0 for s in terms.scales]
    bs = [f.b / s if s else f.b for f, s in zip(terms.factors, scales, strict=True)]
    rows = [f.a * (w * s) for f, w, s in zip(terms.factors, terms.weights, scales, strict=True)]
    return Factors(torch.cat(bs, dim=1), torch.cat(rows, dim=0))
