"""VeRA: `dW = diag(lambda_b) B diag(lambda_d) A` with two random matrices that all modules share.

Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454. The shared matrices are as large as the largest module;
each module uses the first columns of A and the first rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_fields import shaped, shared
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("vera_lambda_b", "vera_lambda_d")
PEFT_SHARED = ("vera_A", "vera_B")
PEFT_FIELDS = ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")

# A is drawn first, with as many columns as the widest module has inputs, which no tensor tells; B is drawn after it.
UNSEEN_SIZES = "PEFT draws it anew for the sizes of all targeted layers together, which the adapter does not tell"


@dataclass(frozen=True)
class VeRA(NoAlpha, LowRank):
    """A VeRA update: two random matrices that all modules share, with trained scales.

    Attributes:
        a: The random matrix A, unread: (rank, at least in).
        b: The random matrix B, unread: (at least out, rank).
        lambda_b: The trained scales of outputs, unread: (out,).
        lambda_d: The trained scales of the rank, unread: (rank,).
    """

    kind: ClassVar[str] = "vera"

    a: LazyTensor
    b: LazyTensor
    lambda_b: LazyTensor
    lambda_d: LazyTensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> Shape:
        return self.lambda_b.shape[0], None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b, "lambda_b": self.lambda_b, "lambda_d": self.lambda_d}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) and shape[1] <= self.a.shape[1]

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        b = read_array(self.lambda_b, "F64")[:, None] * read_array(self.b, "F64", 0, rows)
        a = read_array(self.lambda_d, "F64")[:, None] * read_array(self.a, "F64")[:, :columns]
        return b, a


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without the shared matrices.
    FormatError: parts are missing, or do not fit each other.
    """
    lambda_b, lambda_d = module.need("vera_lambda_b", "vera_lambda_d")
    a, b = (shared(module, name, UNSEEN_SIZES) for name in PEFT_SHARED)
    rank = lambda_d.elements
    shaped(module, vera_lambda_d=(rank,), vera_lambda_b=(None,), vera_A=(rank, None), vera_B=(None, rank))
    if b.shape[0] < lambda_b.shape[0]:
        shaped(module, vera_lambda_b=(b.shape[0],))
    return {"": VeRA(a, b, lambda_b, lambda_d)}
