"""HiRA: `dW = W * (B @ A)`, element by element, so that the update may be of full rank.

Huang et al., 2025, https://openreview.net/forum?id=TwJrTz9cRS. Several adapters each multiply the unmodified base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import HadamardDelta
from loratools.updates.parts.low_rank import weighted
from loratools.updates.parts.peft_fields import shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
PEFT_FIELDS = ("hira_dropout", "init_weights")


@dataclass(frozen=True)
class HiRA(NoAlpha):
    """A HiRA update: the weight times a product of low rank, entry by entry.

    Attributes:
        a: The factor A, unread: (rank, in, *kernel).
        b: The factor B, unread: (out, rank), with as many axes of 1 as the kernel has.
        embedding: Whether a is (rank, tokens) and b is (width, rank), for a weight stored as (tokens, width).
    """

    kind: ClassVar[str] = "hira"
    needs_base: ClassVar[bool] = True

    a: LazyTensor
    b: LazyTensor
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> Shape:
        if self.embedding:
            return self.a.shape[1], self.b.shape[0]
        return self.b.shape[0], *self.a.shape[1:]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: it depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        a = read_array(self.a, "F64").reshape(self.rank, -1)
        b = read_array(self.b, "F64").reshape(-1, self.rank)
        return HadamardDelta(weighted(a.T, b.T, weight, dtype) if self.embedding else weighted(b, a, weight, dtype))


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: parts are missing, or do not fit each other.
    """
    embedding = "hira_embedding_A" in module.parts or "hira_embedding_B" in module.parts
    names = PEFT_PARTS[2:] if embedding else PEFT_PARTS[:2]
    a, b = module.need(*names)
    kernel = (1,) * (len(a.shape) - 2)
    shaped(module, **{names[0]: (None, *[None] * (len(a.shape) - 1)), names[1]: (None, a.shape[0], *kernel)})
    return {"": HiRA(a, b, embedding)}
