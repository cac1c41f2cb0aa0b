"""DeLoRA: `dW = B diag(lambda / (r |a_i| |b_i|)) A diag(|w_j|)`: directions apart from their strength.

Bini et al., 2025, https://arxiv.org/abs/2503.18225. The norms of the base's columns are stored with the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.low_rank import FactorSizes, LowRank
from loratools.updates.parts.peft_fields import shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
PEFT_FIELDS = ("delora_lambda", "module_dropout", "init_weights", "lambda_pattern")
# A direction shorter than this is not made longer.
_SHORTEST = 1e-4


@dataclass(frozen=True)
class DeLoRA(FactorSizes, NoAlpha, LowRank):
    """A DeLoRA update: LoRA with normalised factors and a strength of its own.

    Attributes:
        a: The factor A, unread: (rank, in).
        b: The factor B, unread: (out, rank).
        strength: The strength lambda, unread: (1,).
        norms: The norms of the base's columns, unread: (in,).
    """

    kind: ClassVar[str] = "delora"

    a: LazyTensor
    b: LazyTensor
    strength: LazyTensor
    norms: LazyTensor

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b, "strength": self.strength, "norms": self.norms}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        import numpy as np

        a, b = read_array(self.a, "F64"), read_array(self.b, "F64")
        of_a = np.maximum(np.linalg.norm(a, axis=1), _SHORTEST)
        of_b = np.maximum(np.linalg.norm(b, axis=0), _SHORTEST)
        strengths = read_array(self.strength, "F64") / self.rank / (of_a * of_b)
        return b * strengths, a * read_array(self.norms, "F64")


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: parts are missing, or do not fit each other.
    """
    a, b, strength, norms = module.need(*PEFT_PARTS)
    shaped(module, delora_A=(None, None), delora_lambda=(1,))
    shaped(module, delora_B=(None, a.shape[0]), delora_w_norm=(a.shape[1],))
    return {"": DeLoRA(a, b, strength, norms)}
