"""GraLoRA: the weight in k by k blocks with a small LoRA each, and where hybrid a plain LoRA of the whole besides.

Jung et al., 2025, https://arxiv.org/abs/2505.20355. With rank r, block (m, n), of outputs m and inputs n, has rank
r / k: `dW_mn = scale * (A_n[:, part m] @ B_m[part n])^T`, scale = alpha / (r + rank of the plain LoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_fields import number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
PEFT_FIELDS = ("hybrid_r", "alpha", "gralora_dropout", "gralora_k", "init_weights")


@dataclass(frozen=True)
class GraLoRA(LowRank):
    """A GraLoRA update: a small LoRA for each of k by k blocks of the weight, and perhaps a plain one.

    Attributes:
        a: The factors A of the blocks, unread: (k, in / k, r).
        b: The factors B of the blocks, unread: (k, r, out / k).
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        hybrid_a: The factor A of the plain LoRA, unread: (hybrid rank, in). None if there is none.
        hybrid_b: The factor B of the plain LoRA, unread: (out, hybrid rank). None if there is none.
    """

    kind: ClassVar[str] = "gralora"

    a: LazyTensor
    b: LazyTensor
    alpha: float
    alpha_source: str
    hybrid_a: LazyTensor | None = None
    hybrid_b: LazyTensor | None = None

    @property
    def rank(self) -> int:
        """What alpha is divided by."""
        return self.a.shape[2] + (self.hybrid_a.shape[0] if self.hybrid_a is not None else 0)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        return self.b.shape[0] * self.b.shape[2], self.a.shape[0] * self.a.shape[1]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        tensors = {"A": self.a, "B": self.b, "whole_A": self.hybrid_a, "whole_B": self.hybrid_b}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        import numpy as np

        k, width, r = self.a.shape
        part = r // k
        blocks_a = read_array(self.a, "F64").reshape(k, width, k, part)  # inputs n, input, outputs m, rank
        blocks_b = read_array(self.b, "F64").reshape(k, k, part, -1)  # outputs m, inputs n, rank, output
        # One rank for every m, n and rank of the block; zero outside the block.
        spread_b = np.zeros((k, rows // k, k, k, part))  # outputs m, output; m, n, rank
        spread_a = np.zeros((k, k, part, k, width))  # m, n, rank; inputs n, input
        for block in range(k):
            spread_b[block, :, block] = blocks_b[block].transpose(2, 0, 1)
            spread_a[:, block, :, block] = blocks_a[block].transpose(1, 2, 0)
        b, a = spread_b.reshape(rows, k * r), spread_a.reshape(k * r, columns)
        if self.hybrid_a is not None and self.hybrid_b is not None:
            b = np.concatenate([b, read_array(self.hybrid_b, "F64")], axis=1)
            a = np.concatenate([a, read_array(self.hybrid_a, "F64")], axis=0)
        return b * self.scale, a


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: parts are missing, or do not fit each other.
    """
    a, b = module.need("gralora_A", "gralora_B")
    shaped(module, gralora_A=(None, None, None))
    k, width, r = a.shape
    shaped(module, gralora_B=(k, r, None))
    if r % k:
        raise FormatError(f"'{module.name}' has rank {r} in {k} by {k} blocks, which does not divide it")
    hybrid_a = hybrid_b = None
    if "gralora_A_general" in module.parts or "gralora_B_general" in module.parts:
        hybrid_a, hybrid_b = module.need("gralora_A_general", "gralora_B_general")
        shaped(module, gralora_A_general=(None, k * width))
        shaped(module, gralora_B_general=(k * b.shape[2], hybrid_a.shape[0]))
    return {"": GraLoRA(a, b, number(module, "alpha"), "config", hybrid_a, hybrid_b)}
