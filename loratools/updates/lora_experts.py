"""LoRA of fused experts: `dW[e] = scale * B[e] @ A[e]` of one parameter that holds all experts of a layer.

PEFT's `target_parameters`: A as (experts * rank, in), an expert's rows together; B as (out, rank * experts), an
expert's columns apart. Unsloth before 2026-09 kept an expert's columns of B together (`expert-major`), in files of the
same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from loratools.errors import UndecidedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import Span, columns_in_order, columns_of, rows
from loratools.updates.lora import LoRA, lora_scale
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.protocol import Delta, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats
    from loratools.updates.parts.deltas import FactorDelta

Packing = Literal["peft", "expert-major"]
# How an expert of the parameter is stored in memory: (out, in) or (in, out); `module` and `inverted` leave it to the
# layer, which says so of itself, or says the opposite. It counts where both sizes are equal; shapes decide elsewhere.
Orientation = Literal["out-in", "in-out", "module", "inverted"]
WHICH_PACKING = (
    "trained with Unsloth before September 2026: --expert-packing expert-major; "
    "with a later one, or with PEFT alone: --expert-packing peft"
)


@dataclass(frozen=True)
class LoRAExperts(UpdateDefaults):
    """A LoRA update of all experts of a layer, which are one parameter: (experts, out, in).

    Attributes:
        a: The factors A of all experts, unread: (experts * rank, in).
        b: The factors B of all experts, unread: (out, rank * experts).
        experts: The number of experts.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        rslora: Whether the scale is alpha / sqrt(rank) and not alpha / rank.
        packing: How the experts' columns of B lie. None if the file may have either, and what needs the values asks.
        orientation: How the weight of an expert is stored. None if nothing says it, and square experts are refused.
    """

    kind: ClassVar[str] = "lora-experts"
    needs_base: ClassVar[bool] = False

    a: LazyTensor
    b: LazyTensor
    experts: int
    alpha: float
    alpha_source: str
    rslora: bool = False
    packing: Packing | None = "peft"
    orientation: Orientation | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts, self.b.shape[0], self.a.shape[1]

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.rslora) if self.rank else 0.0

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b}

    @property
    def assumes_alpha(self) -> bool:
        return self.alpha_source == "assumed"

    def with_alpha(self, alpha: float) -> LoRAExperts:
        return replace(self, alpha=alpha, alpha_source="config") if self.assumes_alpha else self

    def as_experts(self) -> LoRAExperts:
        return self

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def packed_as_peft(self) -> LoRAExperts:
        """The same update with the columns of B where PEFT has them."""
        if self._known_packing == "peft":
            return self
        order = tuple(e * self.rank + i for i in range(self.rank) for e in range(self.experts))
        return replace(self, b=columns_in_order(self.b, order), packing="peft")

    @property
    def _known_packing(self) -> Packing:
        if self.packing is None:
            raise UndecidedError(
                "the experts of one parameter may share the columns of B in two ways", hint=WHICH_PACKING
            )
        return self.packing

    def expert(self, index: int) -> LoRA:
        """The update of one expert, (out, in)."""
        ranks = Span(index * self.rank, (index + 1) * self.rank)
        spread = Span(index, self.rank * self.experts, self.experts)
        b = columns_of(self.b, spread if self._known_packing == "peft" else ranks)
        return LoRA(rows(self.a, ranks.start, ranks.stop), b, self.alpha, self.alpha_source, self.rslora)

    def prepare_expert(self, index: int, *, weight: float, dtype: str) -> FactorDelta:
        """Return `weight * dW` of one expert."""
        import numpy as np

        from loratools.updates.parts.deltas import FactorDelta

        rank = self.rank
        ranks = slice(index * rank, (index + 1) * rank)
        a = read_array(self.a, dtype, ranks.start, ranks.stop)
        # The columns of one expert lie apart in every row, so that all of B is read for any of them.
        b = _values(self.b)[:, slice(index, None, self.experts) if self._known_packing == "peft" else ranks]
        return FactorDelta(np.ascontiguousarray(b * (self.scale * weight), a.dtype), a)

    def factors(self) -> Factors | None:
        """None: it is one product for each expert (`expert`)."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        raise NotImplementedError("fused experts are merged one by one")


@lru_cache(maxsize=2)
def _values(tensor: LazyTensor) -> Floats:
    """In float64; kept for the experts that follow, of one layer and no more."""
    return read_array(tensor, "F64")
