"""BOFT: the inputs rotated by a product of butterflies, and the outputs scaled, `W' = diag(s) W R'`.

Liu et al., 2024, https://arxiv.org/abs/2311.06243, as PEFT trains it: each butterfly rotates blocks of inputs that lie
apart. `lycoris-oft` is the other one, which rotates outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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

PEFT_PARTS = ("boft_R", "boft_s")
PEFT_FIELDS = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights")


@dataclass(frozen=True)
class BOFT(NoAlpha):
    """A BOFT update: inputs rotated by butterflies of blocks, and outputs scaled.

    Attributes:
        blocks: Entries of the rotations, unread: (butterflies, blocks, size, size). Only their skew part counts.
        scales: One factor for each output, unread: (out,).
    """

    kind: ClassVar[str] = "boft"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    blocks: LazyTensor
    scales: LazyTensor

    @property
    def shape(self) -> Shape:
        return self.scales.elements, self.blocks.shape[1] * self.blocks.shape[2]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"blocks": self.blocks, "scales": self.scales}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and (shape[0], math.prod(shape[1:])) == self.shape

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        values = read_array(base, "F64").reshape(base.shape[0], -1)
        raw = read_array(self.blocks, "F64")
        rotations = cayley((raw - raw.swapaxes(-1, -2)) / 2)
        merged = values
        # R = R_n ... R_1 with R_i = P_i diag(blocks) P_i', so that W R' = W R_1' ... R_n'.
        for stage, blocks in enumerate(rotations):
            order = _order(values.shape[1], blocks.shape[0] >> stage, blocks.shape[1], len(rotations))
            rotated = times_blocks(merged[:, np.argsort(order)], blocks.swapaxes(1, 2))
            merged = rotated[:, order]
        merged = merged * read_array(self.scales, "F64").reshape(-1, 1)
        return dense(merged - values, weight, dtype)


def _order(size: int, groups: int, block: int, butterflies: int) -> Any:
    """Which input stands where in a butterfly: of each group, half blocks of even number before those of odd number."""
    import numpy as np

    if butterflies == 1:
        return np.arange(size)
    halves = np.arange(size).reshape(groups, -1, block // 2)
    return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers and convolutions."""
    blocks, scales = module.need("boft_R", "boft_s")
    sizes = blocks.shape
    if len(sizes) != 4 or sizes[2] != sizes[3] or not sizes[0]:
        raise faulty(module.name, f"has boft_R {list(sizes)}: (butterflies, blocks, size, size) is needed")
    if sizes[0] > 1 and (sizes[2] % 2 or sizes[1] % (1 << (sizes[0] - 1))):
        raise faulty(module.name, f"has {sizes[1]} blocks of {sizes[2]}, too odd for {sizes[0]} butterflies")
    return {"": BOFT(blocks, scales)}
