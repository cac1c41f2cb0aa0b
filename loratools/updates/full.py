"""Full: a whole difference, `W' = W + scale * diff`, of any shape; also a bias that an adapter adds to.

What ComfyUI and LyCORIS store as `diff` and `diff_b`, `w_norm` and `b_norm`, and PEFT as the bias of B (lora_bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.protocol import Delta, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors


@dataclass(frozen=True)
class Full(UpdateDefaults):
    """A full update: a difference of the same shape as the weight.

    Attributes:
        diff: The difference, unread: the shape of the weight.
        scale: What the difference is multiplied with.
    """

    kind: ClassVar[str] = "full"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    alpha_source: ClassVar[str] = "assumed"
    needs_base: ClassVar[bool] = False

    diff: LazyTensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.diff.shape

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"diff": self.diff}

    def as_full(self) -> Full:
        return self

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        from loratools.updates.parts.deltas import dense

        values = read_array(self.diff, "F64")
        return dense(values.reshape(values.shape[0] if values.ndim else 1, -1), self.scale * weight, dtype)
