"""A tensor of the base and what became of it, and what is to be done should it have changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratools.ops.finetune.layer_kinds import Layer
from loratools.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and what became of it, and what is to be done should it have changed: one of three.

    target    the module, as an adapter names it.
    layer     low-rank factors, as of such a layer; `transposed` where it keeps its weight as (in, out).
    declared  replaced by the fine-tuned tensor, which an adapter declares so (`adapter.Replacement`).
    followed  an embedding that a tied weight follows, on both sides.
    grown     a vocabulary of another number of rows: what both have are the same words.
    by_rows   a table of words, or a head over them without a bias: PEFT can replace some of its rows. Not so of
              positions, whose modules have a forward of their own in some models.
    why       left out, for this reason.
    """

    name: str
    target: str
    base: LazyTensor
    tuned: LazyTensor
    layer: Layer | None = None
    transposed: bool = False
    declared: str | None = None
    followed: bool = False
    grown: bool = False
    by_rows: bool = False
    why: str | None = None

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.tuned.nbytes

    @property
    def declared_whole(self) -> str:
        """How it is declared where all of it is replaced.

        PEFT trains a copy of a module to save, which nothing would follow, but writes an embedding into the base.
        """
        return "embedding" if self.followed else "modules_to_save"

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Its delta as (count, rows, columns): one matrix, or one for each expert."""
        shape = self.base.shape
        return shape if self.layer == "experts" else (1, shape[0], math.prod(shape[1:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Unpaired:
    """A tensor that only one of the two has, and why it is left out; or how it is declared where it is not."""

    name: str
    tensor: LazyTensor
    why: str
    declared: str | None = None


@dataclass(frozen=True)
class Pairs:
    """All tensors of both checkpoints: in `pairs`, or in `unpaired`. Sorted by name, the base's where there are two.

    modules: all that the base has, layers and what they are in, by the names of targets.
    """

    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    modules: frozenset[str]
    warnings: tuple[str, ...]
