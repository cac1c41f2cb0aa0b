"""KaSA: LoRA with singular values of its own, on a base without its least ones, `W' = W_top + scale * B @ diag(d) @ A`.

Wang et al., 2025, https://arxiv.org/abs/2412.06071. PEFT drops the `rank` least singular components of the weight when
the adapter is added, in training as after loading: that is part of the delta against the unmodified base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import lora_scale
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.faults import faulty, require_one_rank
from loratools.updates.parts.low_rank import FactorSizes, weighted
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors


@dataclass(frozen=True)
class KaSA(FactorSizes, UpdateDefaults):
    """A KaSA update: LoRA with a diagonal between the factors, on a base without its least singular values.

    Attributes:
        a: The factor A, unread: (rank, in).
        b: The factor B, unread: (out, rank).
        diagonal: The diagonal d, unread: (rank,). The rank is below both sizes of the weight.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        rslora: Whether the scale is alpha / sqrt(rank) and not alpha / rank.
    """

    kind: ClassVar[str] = "kasa"
    needs_base: ClassVar[bool] = True

    a: LazyTensor
    b: LazyTensor
    diagonal: LazyTensor
    alpha: float
    alpha_source: str
    rslora: bool = False

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.rslora)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b, "diagonal": self.diagonal}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: what is dropped depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        left, singular, right = np.linalg.svd(read_array(base, "F64"), full_matrices=False)
        kept_rank = len(singular) - self.rank
        added = read_array(self.b, "F64") * (read_array(self.diagonal, "F64").reshape(-1) * self.scale)
        b = np.concatenate([added, left[:, kept_rank:] * -singular[kept_rank:]], axis=1)
        a = np.concatenate([read_array(self.a, "F64"), right[kept_rank:]])
        return weighted(b, a, weight, dtype)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers."""
    a, b, diagonal = module.need("lora_A", "lora_B", "lora_diag")
    require_one_rank(module.name, a, b, diagonal, called="lora_diag")
    if a.shape[0] >= min(b.shape[0], a.shape[1]):
        raise faulty(module.name, f"has rank {a.shape[0]}, which would drop all of the base")
    return {"": KaSA(a, b, diagonal, module.alpha, module.alpha_source, bool(module.config.get("use_rslora")))}
