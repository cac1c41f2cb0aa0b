"""QALoRA: LoRA of inputs averaged in groups, `dW = scale * in / group^2 * B @ A`, each column of A repeated.

Xu et al., 2023, https://arxiv.org/abs/2309.14717. PEFT multiplies the averages by the number of groups, and does not
merge, since its bases are quantised; the delta is one of the dequantised weight like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError, UnsupportedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import lora_scale
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# PEFT's default, where the config has none.
_GROUP = 16


@dataclass(frozen=True)
class QALoRA(LowRank):
    """A QALoRA update: LoRA of inputs that are averaged in groups.

    Attributes:
        a: The factor A, unread: (rank, in / group).
        b: The factor B, unread: (out, rank).
        group: How many inputs are averaged.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        rslora: Whether the scale is alpha / sqrt(rank) and not alpha / rank.
    """

    kind: ClassVar[str] = "qalora"

    a: LazyTensor
    b: LazyTensor
    group: int
    alpha: float
    alpha_source: str
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1] * self.group

    @property
    def scale(self) -> float:
        # The sum of a group becomes its average, and that is multiplied by the number of groups.
        return lora_scale(self.alpha, self.rank, self.rslora) * self.a.shape[1] / self.group

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        import numpy as np

        return read_array(self.b, "F64") * self.scale, np.repeat(read_array(self.a, "F64"), self.group, 1)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers of quantised bases, the only ones where PEFT does what `use_qalora` says."""
    a, b = module.need("lora_A", "lora_B")
    group = module.config.get("qalora_group_size", _GROUP)
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise FormatError(f"qalora_group_size = {group!r}: a whole number from 1 is needed")
    if group == 1:
        raise UnsupportedError(
            f"'{module.name}' has groups of one input, where the shapes do not tell QALoRA from LoRA",
            hint="PEFT ignores use_qalora where the base was not quantised; if so, set it to false in the config",
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise faulty(module.name, f"has lora_A {list(a.shape)} and lora_B {list(b.shape)}, of different ranks")
    rslora = bool(module.config.get("use_rslora"))
    return {"": QALoRA(a, b, group, module.alpha, module.alpha_source, rslora)}
