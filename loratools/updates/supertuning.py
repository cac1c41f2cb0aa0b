"""Super-Tuning: trained elements at stored places of the weight, and a plain LoRA where the config has a rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import UnsupportedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.deltas import sparse
from loratools.updates.parts.indices import read_indices
from loratools.updates.parts.low_rank import weighted
from loratools.updates.parts.peft_fields import number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B")
PEFT_FIELDS = ("sparsity", "select_top", "init_weights", "save_precomputed_indices", "lora_dropout")


@dataclass(frozen=True)
class SuperTuning(UpdateDefaults):
    """A Super-Tuning update: trained elements of the weight, and a plain LoRA.

    Attributes:
        values: The values, unread: (n,).
        places: Their places in the weight read row by row, unread: (n,).
        a: The factor A of the LoRA, unread: (rank, in). None if there is none.
        b: The factor B of the LoRA, unread: (out, rank). None if there is none.
        alpha: The number that the scale of the LoRA is made of; None if there is none.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
    """

    kind: ClassVar[str] = "supertuning"
    needs_base: ClassVar[bool] = False

    values: LazyTensor
    places: LazyTensor
    a: LazyTensor | None = None
    b: LazyTensor | None = None
    alpha: float | None = None
    alpha_source: str = "assumed"

    @property
    def rank(self) -> int | None:
        return self.a.shape[0] if self.a is not None else None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.alpha is not None and self.rank else 1.0

    @property
    def shape(self) -> Shape:
        return (self.b.shape[0], self.a.shape[1]) if self.a is not None and self.b is not None else (None, None)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        tensors = {"values": self.values, "places": self.places, "A": self.a, "B": self.b}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape) and self.values.elements <= math.prod(shape)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        out, into = base.shape
        places = read_indices(self.places, out * into, "Super-Tuning")
        row, column = np.divmod(places, into)
        added = None
        if self.a is not None and self.b is not None:
            added = weighted(read_array(self.b, "F64") * self.scale, read_array(self.a, "F64"), weight, dtype)
        return sparse(read_array(self.values, "F64"), row, column, (out, into), weight, dtype, added)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without the places.
    FormatError: parts are missing, or do not fit each other.
    """
    if "supertuning_values" in module.parts and "supertuning_indices" not in module.parts:
        raise UnsupportedError(
            f"'{module.name}' was saved without its indices: PEFT sorts the base's weights by size anew, and those of "
            "equal size, of which 16-bit models have many, come in an order that depends on the machine",
            hint="load it with PEFT where it was trained, and save it with save_precomputed_indices=True",
        )
    values, places = module.need("supertuning_values", "supertuning_indices")
    shaped(module, supertuning_values=(None,), supertuning_indices=(values.elements,))
    if "supertuning_lora_A" not in module.parts and "supertuning_lora_B" not in module.parts:
        return {"": SuperTuning(values, places)}
    a, b = module.need("supertuning_lora_A", "supertuning_lora_B")
    shaped(module, supertuning_lora_A=(None, None), supertuning_lora_B=(None, a.shape[0]))
    return {"": SuperTuning(values, places, a, b, number(module, "lora_alpha"), "config")}
