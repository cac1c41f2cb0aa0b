"""TinyLoRA: `dW = B (sum_i v_i P_i) A`, with the base's leading singular vectors in A and B, and a short vector v that
groups of modules share.

Which v a module takes follows from its number in the model, which no tensor tells. Its random P was drawn with that
number in the seed, and so tells it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError, UnsupportedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.low_rank import FactorSizes, LowRank
from loratools.updates.parts.peft_fields import integer, number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("tinylora_A", "tinylora_B", "tinylora_P")
PEFT_SHARED = ("tinylora_v",)
PEFT_FIELDS = (
    "u",
    "weight_tying",
    "projection_seed",
    "save_projection",
    "init_v_bound",
    "tinylora_dropout",
    "init_weights",
)


@dataclass(frozen=True)
class TinyLoRA(FactorSizes, NoAlpha, LowRank):
    """A TinyLoRA update: the base's leading singular directions, mixed by a short vector that modules share.

    Attributes:
        a: Leading right singular vectors of the base, unread: (rank, in).
        b: Leading left singular vectors of the base, unread: (out, rank).
        p: The random matrices that are mixed, unread: (u, rank, rank).
        v: The trained vector of each group of modules, unread: (u,) each.
        modules: How many modules there are; number i is in group `i // (modules // groups)`, or in the last.
        seed: The seed of the model: P of module i was drawn with seed + i.
        name: The name of the module, for messages.
    """

    kind: ClassVar[str] = "tinylora"

    a: LazyTensor
    b: LazyTensor
    p: LazyTensor
    v: Sequence[LazyTensor]
    modules: int
    seed: int
    name: str

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b, "P": self.p, **{f"v{i}": v for i, v in enumerate(self.v)}}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        import numpy as np

        v = self.v[0] if len(self.v) == 1 else self.v[self._group()]
        middle = np.einsum("i,ijk->jk", read_array(v, "F64"), read_array(self.p, "F64"))
        return read_array(self.b, "F64") @ middle, read_array(self.a, "F64")

    def _group(self) -> int:
        import torch

        stored = self.p.read()
        u, rank, _ = stored.shape
        for i in range(self.modules):
            generator = torch.Generator().manual_seed(self.seed + i)
            drawn = torch.normal(mean=0.0, std=1.0 / rank**0.5, size=(u, rank, rank), generator=generator)
            if torch.equal(drawn.to(stored.dtype), stored):
                return min(i // max(1, self.modules // len(self.v)), len(self.v) - 1)
        raise UnsupportedError(
            f"'{self.name}' shares one of {len(self.v)} vectors, and its P is none that the seed {self.seed} gives, so "
            "that nothing tells which",
            hint="save the adapter with the torch that it was trained with, and with all of its modules",
        )


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without P, which was drawn by the module's number in the model.
    FormatError: parts are missing, or do not fit each other.
    """
    if "tinylora_P" not in module.parts:
        raise UnsupportedError(
            f"'{module.name}' was saved without its P, which PEFT draws by the number that the module has in the "
            "model, which the adapter does not tell",
            hint="load it with PEFT where it was trained, and save it with save_projection=True",
        )
    a, b, p = module.need(*PEFT_PARTS)
    shaped(module, tinylora_A=(None, None))
    rank, modules = a.shape[0], len(module.modules)
    shaped(module, tinylora_B=(None, rank), tinylora_P=(None, rank, rank))
    groups = max(1, round(modules * (1.0 - number(module, "weight_tying", 0.0))))
    names = [f"tinylora_v.{i}" for i in range(groups)]
    if sorted(names) != sorted(name for name in module.shared if name.startswith("tinylora_v.")):
        shared_names = ", ".join(sorted(module.shared)) or "none"
        raise FormatError(
            f"{modules} modules share {groups} vectors by adapter_config.json; the file has {shared_names}",
            hint="save the adapter again, with all of its modules",
        )
    shaped(module, **dict.fromkeys(names, (p.shape[0],)))
    v = tuple(module.shared[name] for name in names)
    return {"": TinyLoRA(a, b, p, v, modules, integer(module, "projection_seed", 42), module.name)}
