"""AdaLoRA: `dW = alpha / (initial rank + 1e-5) * B @ diag(E) @ A`, of the ranks that its training left.

Zhang et al., 2023, https://arxiv.org/abs/2303.10512. As PEFT scales it: by the rank that every module began with, not
by the rank that it was pruned to. A module of rank 0 was pruned away, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.faults import require_one_rank
from loratools.updates.parts.low_rank import FactorSizes, LowRank
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("lora_A", "lora_B", "lora_E")
# What was pruned away has no rows left.
PEFT_MAY_BE_EMPTY = True
PEFT_FIELDS = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
# PEFT's defaults, where the config has none.
_INITIAL_RANK = 12
_ALPHA = 8
# What PEFT adds to the rank, which may be 0, before it divides by it.
_MORE = 1e-5


@dataclass(frozen=True)
class AdaLoRA(FactorSizes, LowRank):
    """An AdaLoRA update: LoRA with a singular value between the factors, pruned while training.

    Attributes:
        a: The factor A, unread: (rank, in).
        b: The factor B, unread: (out, rank).
        e: The singular values, unread: (rank, 1).
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        initial_rank: The rank that the module began with, which alpha is divided by.
    """

    kind: ClassVar[str] = "adalora"

    a: LazyTensor
    b: LazyTensor
    e: LazyTensor
    alpha: float
    alpha_source: str
    initial_rank: int

    @property
    def scale(self) -> float:
        return self.alpha / (self.initial_rank + _MORE)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b, "E": self.e}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        singular = read_array(self.e, "F64").reshape(-1)
        return read_array(self.b, "F64") * (singular * self.scale), read_array(self.a, "F64")


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers. The config's `r` is not what it is scaled by: `init_r` is."""
    a, b, e = module.need("lora_A", "lora_B", "lora_E")
    require_one_rank(module.name, a, b, e, called="lora_E")
    initial, alpha = module.config.get("init_r", _INITIAL_RANK), module.config.get("lora_alpha", _ALPHA)
    if not isinstance(initial, int) or initial < 0 or not isinstance(alpha, int | float):
        raise FormatError(f"adapter_config.json has init_r {initial!r} and lora_alpha {alpha!r}: numbers are needed")
    # PEFT takes the rank at the time for an alpha that is not positive, which is the one that pruning left.
    alpha_value = float(alpha) if alpha > 0 else float(a.shape[0])
    return {"": AdaLoRA(a, b, e, alpha_value, "config" if "lora_alpha" in module.config else "assumed", initial)}
