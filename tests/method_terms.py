"""Terms for the tests of methods: adapters of different ranks and scales on one target, all sizes different."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools import methods, registry
from loratools.algebra.lowrank import Factors, Framed
from loratools.methods import Terms

OUT, IN = 13, 11


def dense(result: object) -> Tensor:
    """Whatever a method returns, as a matrix: by multiplying it out."""
    if isinstance(result, Factors):
        return result.b @ result.a
    if isinstance(result, Framed):
        right = result.right.times(torch.eye(result.core.shape[1], dtype=torch.float64))
        return result.left.times(result.core) @ right.mT
    assert isinstance(result, Tensor)
    return result


def make_terms(
    ranks: Sequence[int] = (2, 3, 4),
    *,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    shape: tuple[int, int] = (OUT, IN),
    name: str = "layer.q",
) -> Terms:
    generator = torch.Generator().manual_seed(seed)
    scales = scales or [0.5 + 0.75 * i for i in range(len(ranks))]
    factors = []
    for rank, scale in zip(ranks, scales, strict=True):
        b = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
        factors.append(Factors(b * scale, torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)))
    return Terms(name, tuple(factors), tuple(weights or [1.0] * len(ranks)), tuple(scales))


def run(name: str, terms: Terms, **options: object) -> Tensor:
    return dense(registry.load("methods", name).combine(terms, **methods.settings(name, options)))


def deltas(terms: Terms) -> list[Tensor]:
    """`w_i dW_i`, multiplied out."""
    return [w * f.b @ f.a for w, f in zip(terms.weights, terms.factors, strict=True)]
