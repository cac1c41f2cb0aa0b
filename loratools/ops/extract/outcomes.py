"""What a pair of tensors can become in an extraction, with what was measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from loratools.ops.finetune.delta import Rounding
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reordered
from loratools.updates.parts.protocol import Update


@dataclass(frozen=True)
class Unchanged:
    """The bytes or the values are the same."""

    norm: ClassVar[float] = 0.0


@dataclass(frozen=True)
class ReplacedTensor:
    """Replaced by the fine-tuned tensor, or by those `rows` of it. `norm` of the change; None if shapes differ."""

    norm: float | None
    declared: str
    rows: tuple[int, ...] | None = None

    def part_of(self, tuned: LazyTensor) -> LazyTensor:
        """What of the fine-tuned tensor replaces the base's."""
        return tuned if self.rows is None else reordered(tuned, self.rows)


@dataclass(frozen=True)
class NotExtracted:
    """Changed and left out. `norm` of the change; None if it has none."""

    norm: float | None
    why: str


@dataclass(frozen=True, eq=False)
class Factored:
    """Became an update, and what was measured on it; see `ops.finetune.delta.Extracted`."""

    update: Update
    rank: int
    norm: float
    error: float
    gap_bound: float
    gap_estimate: float
    rounding: Rounding


Outcome: TypeAlias = Factored | ReplacedTensor | NotExtracted | Unchanged
