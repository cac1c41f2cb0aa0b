"""FRoD: `W' = U (diag(l) + S) V^T` in place of the weight, with V shared by all layers of one kind of module.

Before training, U and l are the directions and lengths of `W V^-T`, so that W' = W; l and the sparse S are trained.
V is stored, and U follows from it and the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.indices import read_indices
from loratools.updates.parts.peft_fields import shaped, shared
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("frod_lambda_l", "frod_lambda_s_values")
PEFT_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
PEFT_FIELDS = (
    "projection_prng_key",
    "save_projection",
    "frod_dropout",
    "init_weights",
    "sparse_rate",
    "regularization_alpha",
    "progressbar",
    "runtime_offload_base_weight",
)
_NOT_STORED = "it is found from the weights of all layers together, by eigenvectors whose signs are not determined"
# Shorter directions count as zero (of U), and smaller singular values as none (of V that cannot be inverted).
_SHORTEST, _SMALLEST = 1e-12, 1e-6


@dataclass(frozen=True)
class FRoD(NoAlpha):
    """A FRoD update: the weight in the directions V, with trained lengths and a sparse matrix S between.

    Attributes:
        v: The directions V, shared by modules of one kind, unread: (in, in).
        lengths: The lengths l, unread: (in,).
        values: The trained values of S, unread: (n,).
        places: Rows and columns of these values, unread: (2, n).
    """

    kind: ClassVar[str] = "frod"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    v: LazyTensor
    lengths: LazyTensor
    values: LazyTensor
    places: LazyTensor

    @property
    def shape(self) -> Shape:
        return None, self.v.shape[0]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"V": self.v, "lengths": self.lengths, "values": self.values, "places": self.places}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: it depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        w, v = read_array(base, "F64"), read_array(self.v, "F64")
        try:
            unscaled = np.linalg.solve(v, w.T).T
        except np.linalg.LinAlgError:
            unscaled = w @ np.linalg.pinv(v, rcond=_SMALLEST).T
        norms = np.linalg.norm(unscaled, axis=0)
        u = np.divide(unscaled, norms, out=np.zeros_like(unscaled), where=norms > _SHORTEST)
        middle = np.diag(read_array(self.lengths, "F64"))
        np.add.at(middle, tuple(read_indices(self.places, v.shape[0], "FRoD")), read_array(self.values, "F64"))
        return dense(u @ middle @ v.T - w, weight, dtype)


def category(module: str) -> str:
    """The name under which PEFT stores what a module shares with modules of the same kind in other layers."""
    names = module.split(".")
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    if names[-2:] == ["output", "dense"] and names[-3:-2] == ["attention"]:
        return "attention_output"
    return "_".join(names[-2:])


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without what modules share.
    FormatError: parts are missing, or do not fit each other.
    """
    lengths, values = module.need(*PEFT_PARTS)
    names = [f"{name}.{category(module.name)}" for name in PEFT_SHARED]
    v, places, _ = (shared(module, name, _NOT_STORED) for name in names)
    n = lengths.elements
    shaped(module, frod_lambda_l=(None,), frod_lambda_s_values=(None,))
    shaped(module, **{names[0]: (n, n), names[1]: (2, values.elements), names[2]: (2,)})
    return {"": FRoD(v, lengths, values, places)}
