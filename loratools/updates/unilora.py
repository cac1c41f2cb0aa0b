"""Uni-LoRA: `dW = B @ A`, every element of both factors an element of one short vector, times a fixed scale.

Li et al., 2025, https://arxiv.org/abs/2506.00799.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.indices import read_indices
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_fields import shaped, shared
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
PEFT_SHARED = ("unilora_theta_d",)
PEFT_FIELDS = ("proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights", "save_indices")
# Without `save_indices` there is nothing of any module in the file.
PEFT_SHARED_ALONE = (
    "it was saved without its indices, and PEFT shuffles those of all modules together, in the order in which the "
    "model has them, which the adapter does not tell: load it with PEFT where it was trained, and save it with "
    "save_indices=True"
)


@dataclass(frozen=True)
class UniLoRA(NoAlpha, LowRank):
    """A Uni-LoRA update: both factors made of the elements of one short vector.

    Attributes:
        theta: The vector, shared by all modules, unread: (d,).
        indices_a: Which element of theta each element of A is, unread: (rank, in).
        indices_b: Which element of theta each element of B is, unread: (out, rank).
        scales_a: What the elements of A are multiplied with, unread: (rank, in).
        scales_b: What the elements of B are multiplied with, unread: (out, rank).
    """

    kind: ClassVar[str] = "unilora"

    theta: LazyTensor
    indices_a: LazyTensor
    indices_b: LazyTensor
    scales_a: LazyTensor
    scales_b: LazyTensor

    @property
    def rank(self) -> int:
        return self.indices_a.shape[0]

    @property
    def shape(self) -> Shape:
        return self.indices_b.shape[0], self.indices_a.shape[1]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        of_a = {"indices_A": self.indices_a, "scales_A": self.scales_a}
        return {"theta": self.theta, **of_a, "indices_B": self.indices_b, "scales_B": self.scales_b}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        theta = read_array(self.theta, "F64")
        a = theta[read_indices(self.indices_a, theta.size, "Uni-LoRA's A")] * read_array(self.scales_a, "F64")
        b = theta[read_indices(self.indices_b, theta.size, "Uni-LoRA's B")] * read_array(self.scales_b, "F64")
        return b, a


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: parts are missing, or do not fit each other.
    """
    indices_a, indices_b, scales_a, scales_b = module.need(*PEFT_PARTS)
    theta = shared(module, "unilora_theta_d", "it is trained")
    shaped(module, unilora_theta_d=(None,), unilora_indices_A=(None, None))
    shaped(module, unilora_indices_B=(None, indices_a.shape[0]))
    shaped(module, unilora_scales_A=indices_a.shape, unilora_scales_B=indices_b.shape)
    return {"": UniLoRA(theta, indices_a, indices_b, scales_a, scales_b)}
