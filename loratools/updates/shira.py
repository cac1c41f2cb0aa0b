"""SHiRA: `dW` zero but for a few trained elements, whose places are stored.

Bhardwaj et al., 2024, https://arxiv.org/abs/2406.13175.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import rows
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import sparse
from loratools.updates.parts.indices import read_indices
from loratools.updates.parts.peft_fields import shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("shira_weight", "shira_indices")
PEFT_FIELDS = ("mask_type", "random_seed", "init_weights")


@dataclass(frozen=True)
class SHiRA(NoAlpha):
    """A SHiRA update: a few trained elements of the weight.

    Attributes:
        values: The values, unread: (n,). Values at the same place add up.
        places: Their rows and columns, unread: (2, n).
        rank: The rank of a LoRA with as many numbers: n is `rank * (in + out)`. None if it is not known.
    """

    kind: ClassVar[str] = "shira"
    shape: ClassVar[Shape] = (None, None)
    needs_base: ClassVar[bool] = False

    values: LazyTensor
    places: LazyTensor
    rank: int | None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"values": self.values, "places": self.places}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and (self.rank is None or self.rank * sum(shape) == self.values.elements)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        out, into = base.shape
        row, column = (
            read_indices(rows(self.places, axis, axis + 1), size, f"SHiRA, along axis {axis},").reshape(-1)
            for axis, size in enumerate((out, into))
        )
        return sparse(read_array(self.values, "F64"), row, column, (out, into), weight, dtype)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: parts are missing, or do not fit each other.
    """
    values, places = module.need(*PEFT_PARTS)
    shaped(module, shira_weight=(None,), shira_indices=(2, values.elements))
    return {"": SHiRA(values, places, module.rank)}
