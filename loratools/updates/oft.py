"""OFT: the inputs rotated in blocks, `W' = W R'` with R orthogonal, as PEFT trains it.

Qiu et al., 2023, https://arxiv.org/abs/2306.07280; the series in place of Cayley's inverse: Qiu et al., 2025,
https://arxiv.org/abs/2506.19847. OneTrainer's is nearly the same (`from_lycoris`); `lycoris-oft` is the other one,
which rotates outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError, UnsupportedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update
from loratools.updates.parts.rotations import cayley, times_blocks

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("oft_R", "oft_embedding_R")
# The series converges in tens of terms or never; more than this is damage.
_MOST_TERMS = 10_000
# OneTrainer has no other number of them.
_ONETRAINER_TERMS = 5
PEFT_FIELDS = (
    "oft_block_size",
    "module_dropout",
    "init_weights",
    "coft",
    "eps",
    "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
)


@dataclass(frozen=True)
class OFT(NoAlpha):
    """An OFT update: the inputs rotated in blocks.

    Attributes:
        skew: The entries of Q above the diagonal, row by row, unread: (blocks, size (size - 1) / 2).
        terms: Terms of the series that is taken for Cayley's map; None for the map itself, which PEFT takes of -Q.
        old_series: Whether the last term counts twice as well, as it did before PEFT 0.18.
        most: The norm that Q of a block is cut down to, times the root of the number of blocks (COFT); None if there is
            no bound.
        embedding: Whether it is of a weight (tokens, width), whose outputs are rotated and not its inputs.
        shared: Whether there is one block, which is repeated.
        rooted: Whether the entries are divided by the root of their number in a block (OneTrainer's scaled OFT).
        kernels: Whether a convolution's weight is multiplied with R and not with its transpose, as OneTrainer does.
    """

    kind: ClassVar[str] = "oft"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    skew: LazyTensor
    terms: int | None = None
    old_series: bool = False
    most: float | None = None
    embedding: bool = False
    shared: bool = False
    rooted: bool = False
    kernels: bool = False

    @property
    def block_size(self) -> int:
        return (1 + math.isqrt(1 + 8 * self.skew.shape[1])) // 2

    @property
    def shape(self) -> Shape:
        return (None, None if self.shared else self.skew.shape[0] * self.block_size)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"skew": self.skew}

    def fits(self, shape: tuple[int, ...]) -> bool:
        columns = math.prod(shape[1:])
        if len(shape) < 2 or (self.embedding and len(shape) != 2):
            return False
        return columns % self.block_size == 0 if self.shared else columns == self.shape[1]

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        values = read_array(base, "F64").reshape(base.shape[0], -1)
        blocks = self._blocks()
        if self.shared:
            blocks = np.repeat(blocks, values.shape[1] // self.block_size, axis=0)
        as_it_is = self.embedding or (self.kernels and len(base.shape) > 2)
        matrices = blocks if as_it_is else blocks.swapaxes(1, 2)
        return dense(times_blocks(values, matrices) - values, weight, dtype)

    def _blocks(self) -> Floats:
        """R, (blocks, size, size)."""
        import numpy as np

        size, stored = self.block_size, read_array(self.skew, "F64")
        if self.rooted:
            stored /= math.sqrt(stored.shape[1])
        skew = np.zeros((len(stored), size, size))
        rows, columns = np.triu_indices(size, 1)
        skew[:, rows, columns] = stored
        skew -= skew.swapaxes(1, 2)
        if self.most is not None:
            norm = np.sqrt(np.square(skew).sum(axis=(1, 2), keepdims=True))
            most = self.most / math.sqrt(len(skew))
            skew *= np.divide(most, norm, out=np.ones_like(norm), where=norm > most)
        if self.terms is None:
            return cayley(skew)
        # I + 2 Q + 2 Q^2 + ..., and since 0.18 a last power that counts once; three terms are four there.
        short = self.terms < 3 or self.old_series
        twice = self.terms - 1 if short else max(self.terms - 2, 2)
        total, power = np.broadcast_to(np.eye(size), skew.shape).copy(), skew
        for _ in range(twice):
            total += 2 * power
            power = power @ skew
        if not short:
            total += power
        series: Floats = total
        return series


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers, convolutions and embeddings, with or without a shared block, constrained, by map or series."""
    embedding = "oft_embedding_R" in module.parts
    (skew,) = module.need("oft_embedding_R" if embedding else "oft_R")
    config = module.config
    if len(skew.shape) != 2 or not skew.shape[0]:
        raise faulty(module.name, f"has {'oft_embedding_R' if embedding else 'oft_R'} {list(skew.shape)}")
    series = bool(config.get("use_cayley_neumann", True))
    terms, most = config.get("num_cayley_neumann_terms", 5), config.get("eps", 6e-5)
    shared = bool(config.get("block_share", False))
    if not isinstance(terms, int) or not terms <= _MOST_TERMS or not isinstance(most, int | float):
        raise FormatError(
            f"num_cayley_neumann_terms = {terms!r} and eps = {most!r}: numbers are needed, and at most {_MOST_TERMS} "
            "terms of the series"
        )
    update = OFT(
        skew,
        terms if series else None,
        _is_before_0_18(config.get("peft_version")),
        float(most) if config.get("coft", False) else None,
        embedding,
        shared,
    )
    _ensure_blocks(module.name, update)
    return {"": update}


def from_lycoris(parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
    """The module's update as OneTrainer's `OFTModule` computes it without COFT, of which its files do not tell: blocks
    of rotations of the inputs, one of them for all where there is one.

    Raises:
        FormatError: The entries of no block.
        UnsupportedError: Anything beside them.
    """
    skew, scaled = parts.get("oft_R.weight"), parts.get("oft_R.scaled_oft")
    if skew is None or len(skew.shape) != 2 or 0 in skew.shape:
        raise faulty(
            name, f"has oft_R {list(skew.shape) if skew is not None else []}, which is above the diagonal of no block"
        )
    other_parts = sorted(part for part in parts if not part.startswith("oft_R."))
    if other_parts or alpha is not None:
        raise UnsupportedError(f"OFT of OneTrainer with {', '.join(other_parts) or 'alpha'}")
    rooted = scaled is not None and scaled.elements == 1 and scaled.scalar() != 0
    update = OFT(skew, _ONETRAINER_TERMS, shared=skew.shape[0] == 1, rooted=rooted, kernels=True)
    _ensure_blocks(name, update)
    return {"": update}


def _ensure_blocks(name: str, update: OFT) -> None:
    rows, entries = update.skew.shape
    if update.block_size * (update.block_size - 1) // 2 != entries or (update.shared and rows != 1):
        raise faulty(name, f"has oft_R {[rows, entries]}, which is above the diagonal of no block")


def _is_before_0_18(version: object) -> bool:
    """PEFT writes its version since 0.18."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version)) if version is not None else None
    return numbers is None or tuple(map(int, numbers.groups())) < (0, 18)
