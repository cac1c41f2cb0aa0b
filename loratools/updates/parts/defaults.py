"""What holds of most kinds of update: the answers that a kind's own class overrides where they are not its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats
    from loratools.tensors.lazy import LazyTensor
    from loratools.updates.full import Full
    from loratools.updates.lora import LoRA
    from loratools.updates.lora_experts import LoRAExperts
    from loratools.updates.parts.protocol import Update


class UpdateDefaults:
    """The members of `Update` that most kinds answer alike; what each one means is said there."""

    @property
    def embedding(self) -> bool:
        return False

    @property
    def optional(self) -> bool:
        return False

    @property
    def whole_delta(self) -> bool:
        return False

    @property
    def assumes_alpha(self) -> bool:
        return False

    def with_alpha(self: Update, alpha: float) -> Update:
        return self

    @property
    def reads_layer_weight(self) -> bool:
        return False

    def with_layer_weight(self: Update, weight: LazyTensor) -> Update:
        return self

    def as_lora(self) -> LoRA | None:
        return None

    def as_full(self) -> Full | None:
        return None

    def as_experts(self) -> LoRAExperts | None:
        return None

    def cut_rows(self: Update, start: int, stop: int) -> Update | None:
        return None

    def stack_rows(self: Update, others: Sequence[Update]) -> Update | None:
        return None

    def delta(self: Update, *, base: LazyTensor | None = None) -> Floats:
        from loratools.updates.parts.dense import dense_delta

        return dense_delta(self, base, "F32")

    def lycoris_parts(self: Update) -> Mapping[str, LazyTensor] | None:
        return self.parts

    def lycoris_alpha(self: Update) -> float | None:
        return self.alpha


class NoAlpha(UpdateDefaults):
    """The fields of kinds without an alpha."""

    alpha: ClassVar[None] = None
    alpha_source: ClassVar[str] = "assumed"
    scale: ClassVar[float] = 1.0
