"""MiSS, once called Bone: one small block added along all inputs, `dW[o, i] = D[i mod rank, o]`.

Kang and Yin, 2024, https://arxiv.org/abs/2409.15371. `mini` repeats a narrower block along the outputs as well; `bat`
adds `W D + D` for every block of the weight, which depends on the base. The first two are exactly of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import FactorDelta, dense
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("miss_block", "bone_block")
PEFT_FIELDS = ("miss_dropout", "mini_r", "init_weights")


@dataclass(frozen=True)
class MiSS(NoAlpha):
    """A MiSS update: one small block added along all inputs.

    Attributes:
        block: The block D, unread: (rank, out); (rank, width) with `mini`; (out / rank, rank, rank) is the variant
            `bat`.
        mini: Whether the block is narrower than the outputs, and repeated along them.
    """

    kind: ClassVar[str] = "miss"

    block: LazyTensor
    mini: bool = False

    @property
    def rank(self) -> int:
        return self.block.shape[-1] if self.needs_base else self.block.shape[0]

    @property
    def shape(self) -> Shape:
        if self.needs_base:
            return self.block.shape[0] * self.block.shape[1], None
        return None if self.mini else self.block.shape[1], None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"block": self.block}

    @property
    def needs_base(self) -> bool:
        return len(self.block.shape) == 3

    def fits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or shape[1] < self.rank:
            return False
        if self.mini:
            return shape[0] % self.block.shape[1] == 0
        return shape[0] == self.shape[0] and not (self.needs_base and shape[1] % self.rank)

    def factors(self) -> Factors | None:
        """None: the block does not tell how many inputs it is repeated along."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        out, inputs = base.shape[0], math.prod(base.shape[1:])
        block = read_array(self.block, "F64")
        if self.needs_base:
            values = read_array(base, "F64").reshape(len(block), self.rank, -1, self.rank)
            delta = np.einsum("oaib,obc->oaic", values, block, optimize=True) + block[:, :, None, :]
            return dense(delta.reshape(out, inputs), weight, dtype)
        kind = np.float64 if dtype == "F64" else np.float32
        b = np.tile(block.T, (out // block.shape[1], 1)) * weight
        a = np.arange(inputs) % self.rank == np.arange(self.rank)[:, None]
        return FactorDelta(b.astype(kind), a.astype(kind))


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers, in all three forms; Bone stores the same under another name."""
    block = module.parts.get("bone_block")
    if block is None:
        (block,) = module.need("miss_block")
    form = module.config.get("init_weights")
    if len(block.shape) != (3 if form == "bat" else 2) or (form == "bat" and block.shape[1] != block.shape[2]):
        raise faulty(
            module.name, f"has a block {list(block.shape)}, and init_weights is {form!r} in adapter_config.json"
        )
    return {"": MiSS(block, form == "mini")}
