"""DEFT: what a few directions P hold of the weight is taken out, and R put in its place: `dW = Q (scale R - F^T W)`.

Q and F come from P: both its orthogonal basis (qr), or P itself and its positive part (relu). With PaRa
(https://arxiv.org/abs/2406.05641) nothing is put in place, and R is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.low_rank import weighted
from loratools.updates.parts.peft_fields import chosen, number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("deft_P", "deft_R")
PEFT_FIELDS = ("decomposition_method", "init_scale", "alpha", "para", "deft_dropout", "init_weights")


@dataclass(frozen=True)
class DEFT(UpdateDefaults):
    """A DEFT update: a few directions of the weight are removed, and others put in their place.

    Attributes:
        p: The directions P, unread: (out, rank).
        r: What replaces them, unread: (rank, in). None if nothing does (PaRa).
        method: How Q and F are made from P: `qr` or `relu`.
        alpha: The number that the scale of R is made of; None if there is no R.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
    """

    kind: ClassVar[str] = "deft"
    needs_base: ClassVar[bool] = True

    p: LazyTensor
    r: LazyTensor | None
    method: str
    alpha: float | None
    alpha_source: str

    @property
    def rank(self) -> int:
        return self.p.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.alpha else 1.0

    @property
    def shape(self) -> Shape:
        return self.p.shape[0], self.r.shape[1] if self.r is not None else None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"P": self.p} | ({"R": self.r} if self.r is not None else {})

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: it depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        p = read_array(self.p, "F64")
        # Q's signs count, since R was trained with them: those of Householder reflections, as torch and numpy have.
        into, out_of = (p, np.maximum(p, 0)) if self.method == "relu" else (np.linalg.qr(p)[0],) * 2
        a = -(out_of.T @ read_array(base, "F64"))
        if self.r is not None:
            a += self.scale * read_array(self.r, "F64")
        return weighted(into, a, weight, dtype)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: another way from P to Q.
    FormatError: parts are missing, or do not fit each other.
    """
    para = module.config.get("para") is True
    method = chosen(module, "decomposition_method", ("relu", "qr"), "relu")
    p, *factors = module.need(*(PEFT_PARTS[:1] if para else PEFT_PARTS))
    shaped(module, deft_P=(None, None))
    shaped(module, deft_R=(p.shape[1], None))
    alpha = number(module, "alpha") if module.config.get("alpha") else None
    return {"": DEFT(p, factors[0] if factors else None, method, alpha, "config" if alpha else "assumed")}
