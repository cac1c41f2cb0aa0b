"""PEFT 0.21's ways to combine adapters (`add_weighted_adapter`), for people who need the same numbers.

Methods on factors compute `B = merge(sqrt|w s| B_i)` and `A = merge(sign sqrt|w s| A_i)` separately, so the product
also holds cross terms `B_i A_j` of different adapters. For T independent adapters of equal size, the result differs
from the right one by `sqrt(T - 1)` times its size. It also depends on how a delta is split into factors. `loratools`
computes in float64 and PEFT in the dtype of the adapters; and loratools uses the right scale for rsLoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from loratools.errors import MismatchError, UnsupportedError
from loratools.methods import Option, Terms
from loratools.methods.common.elementwise import space

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from loratools.algebra.sparsify import Blocks, Rule
    from loratools.methods import Combination

# Takes one matrix, given as blocks, and the target's random numbers; returns the rule of what is kept.
Prune: TypeAlias = "Callable[[Blocks, Generator], Rule]"
# Takes the matrices of all adapters and their weights; returns one matrix.
Join: TypeAlias = "Callable[[Sequence[Tensor], Sequence[float]], Tensor]"

ON = Option(
    "on",
    "factors",
    "what is merged: A and B separately, or whole deltas as PEFT's combination types with _svd do",
    choices=("factors", "deltas"),
)
DENSITY = Option("density", 0.5, "share of the entries that is kept; PEFT has no default", low=0, high=1)
MAJORITY = Option("majority", "total", "PEFT's majority_sign_method", choices=("total", "frequency"))


def merged(terms: Terms, on: str, prune: Prune, join: Join) -> Combination:
    from loratools.algebra.lowrank import Factors

    generator = terms.generator(0)
    if on == "deltas":
        plain = space(replace(terms, weights=(1.0,) * len(terms)), "full")
        rules = [prune(plain.blocks(i), generator) for i in range(len(terms))]
        return plain.by_blocks(
            lambda blocks: join([keep(x) for keep, x in zip(rules, blocks, strict=True)], terms.weights)
        )
    pairs, weights = _pairs(terms)
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]

    def one(side: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return join([prune(partial(_in_a_list, x), generator)(x) for x in side], weights)

    a = one([a for _, a in pairs], signed)
    return Factors(one([b for b, _ in pairs], roots), a)


def _in_a_list(x: Tensor) -> list[Tensor]:
    return [x]


def summed(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    import torch

    return torch.stack([m * w for m, w in zip(matrices, weights, strict=True)]).sum(dim=0)


def elected(majority: str) -> Join:
    """The sign of the sum, or of the majority, of unweighted matrices; zero counts as positive."""

    def join(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        import torch

        stack = torch.stack(list(matrices))
        votes = stack.sum(dim=0) if majority == "total" else stack.sign().sum(dim=0)
        agree = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
        scaled = stack * torch.tensor(list(weights), dtype=torch.float64).view(-1, 1, 1)
        average: Tensor = (scaled * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
        return average

    return join


def everything(blocks: Blocks, generator: Generator) -> Rule:
    return lambda x: x


def by_magnitude(density: float) -> Prune:
    from loratools.algebra.sparsify import largest

    return lambda blocks, _: largest(blocks, density, least=0)


def by_chance(density: float) -> Prune:
    def rule(generator: Generator) -> Rule:
        import torch

        def keep(x: Tensor) -> Tensor:
            if density >= 1:
                return x
            # float32, as PEFT draws: another dtype would take different numbers from the generator.
            mask = torch.bernoulli(torch.full(x.shape, density, dtype=torch.float32), generator=generator)
            return x * mask / density

        return keep

    return lambda _, generator: rule(generator)


def equal_ranks(terms: Terms) -> None:
    """Raise MismatchError if the ranks of the factors differ, so that they cannot be added."""
    ranks = [f.rank for f in terms.factors]
    if len(set(ranks)) > 1:
        raise MismatchError(
            f"factors of different ranks cannot be added: '{terms.name}' has {', '.join(map(str, ranks))}",
            hint="--method linear takes any ranks; or bring the adapters to one rank with loratools resize",
        )


def _pairs(terms: Terms) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """B and A before scaling, and the weights with the scales in them."""
    if None in terms.scales:
        raise UnsupportedError(
            f"'{terms.name}' is not a plain pair of factors in every adapter, as this method needs",
            hint="--method linear, and most others, take any kind of update",
        )
    equal_ranks(terms)
    scales = [s or 0.0 for s in terms.scales]
    pairs = [(f.b / s if s else f.b, f.a) for f, s in zip(terms.factors, scales, strict=True)]
    return pairs, [w * s for w, s in zip(terms.weights, scales, strict=True)]
