"""OSF: the largest singular directions of the weight are kept, and the rest is replaced: `W' = W_high + U S V`.

Nayak et al., 2025, https://arxiv.org/abs/2504.07097. `dW = U S V - W_low`, with W_low what the singular value
decomposition of the base has in the places that were trained; the signs of its vectors cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.storage.casting import rounded
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.peft_fields import shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("osf_svd_params",)
PEFT_FIELDS = ("effective_rank", "init_weights", "target_svd_config")
_U, _S, _V = (f"osf_svd_params.{name}_low" for name in "USV")


@dataclass(frozen=True)
class OSF(NoAlpha):
    """An OSF update: the least singular directions of the weight replaced by trained ones.

    The n trained directions are the last of all min(out, in).

    Attributes:
        u: The trained left vectors U, unread: (out, n).
        s: The trained singular values S, unread: (n,).
        v: The trained right vectors V, unread: (n, in).
    """

    kind: ClassVar[str] = "osf"
    needs_base: ClassVar[bool] = True

    u: LazyTensor
    s: LazyTensor
    v: LazyTensor

    @property
    def rank(self) -> int:
        return self.s.elements

    @property
    def shape(self) -> Shape:
        return self.u.shape[0], self.v.shape[1]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"U": self.u, "S": self.s, "V": self.v}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: it depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        u, s, v = np.linalg.svd(read_array(base, "F64"), full_matrices=False)
        kept_rank = s.size - self.rank
        # Training starts from the decomposition in the base's own dtype, and moved away from that.
        u, s, v = (_rounded(x, base.dtype) for x in (u[:, kept_rank:], s[kept_rank:], v[kept_rank:]))
        trained = (read_array(self.u, "F64") * read_array(self.s, "F64")) @ read_array(self.v, "F64")
        return dense(trained - (u * s) @ v, weight, dtype)


def _rounded(values: Floats, dtype: str) -> Floats:
    import torch

    stored: Floats = rounded(torch.from_numpy(values), dtype).double().numpy()
    return stored


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: parts are missing, or do not fit each other.
    """
    u, s, v = module.need(_U, _S, _V)
    shaped(module, **{_U: (None, None), _V: (None, None), _S: (None,)})
    n = s.elements
    shaped(module, **{_U: (None, n), _V: (n, None)})
    if n > min(u.shape[0], v.shape[1]):
        shaped(module, **{_S: (min(u.shape[0], v.shape[1]),)})
    return {"": OSF(u, s, v)}
