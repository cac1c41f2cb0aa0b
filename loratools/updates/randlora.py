"""RandLoRA: a sum of products of random bases that all modules share, each weighted by two trained vectors.

Albert et al., 2025, https://arxiv.org/abs/2502.00987. Full rank is reached by as many bases as it takes:
`dW = scale * sum_n B_n diag(lambda_n) A diag(gamma_n)`, the shorter side of the weight along A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_fields import number, shaped, shared
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Shape, Update
from loratools.updates.vera import UNSEEN_SIZES

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

# PEFT stores the shared matrices once, and again under every module.
PEFT_PARTS = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
PEFT_SHARED = ("randlora_A", "randlora_B")
PEFT_FIELDS = (
    "projection_prng_key",
    "save_projection",
    "sparse",
    "very_sparse",
    "randlora_dropout",
    "randlora_alpha",
    "init_weights",
)


@dataclass(frozen=True)
class RandLoRA(LowRank):
    """A RandLoRA update: a weighted sum of products of random bases.

    `short` and `long` are the sides of the weight.

    Attributes:
        a: The random bases A, shared by modules, unread: (r, 1, at least short).
        b: The random bases B, shared by modules, unread: (at least long, at least bases, r).
        lambda_: The trained weights inside each product, unread: (r, bases).
        gamma: The trained weights of inputs or outputs, unread: (bases, short).
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
    """

    kind: ClassVar[str] = "randlora"

    a: LazyTensor
    b: LazyTensor
    lambda_: LazyTensor
    gamma: LazyTensor
    alpha: float
    alpha_source: str

    @property
    def rank(self) -> int:
        """What the config calls r: the rank of one base."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        return None, None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"A": self.a, "B": self.b, "lambda": self.lambda_, "gamma": self.gamma}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and min(shape) == self.gamma.shape[1] and max(shape) <= self.b.shape[0]

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        short, long, bases = min(rows, columns), max(rows, columns), self.gamma.shape[0]
        a = read_array(self.a, "F64")[:, :, :short]
        lambda_, gamma = read_array(self.lambda_, "F64"), read_array(self.gamma, "F64")
        # As PEFT trains it, A runs through ranks and then bases, and B through bases and then ranks.
        inner = (lambda_[:, :, None] * a * gamma[None]).reshape(-1, short)
        outer = read_array(self.b, "F64", 0, long)[:, :bases].reshape(long, -1) * self.scale
        return (outer, inner) if short == columns else (inner.T, outer.T)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without the shared matrices.
    FormatError: parts are missing, or do not fit each other.
    """
    lambda_, gamma = module.need("randlora_lambda", "randlora_gamma")
    a, b = (shared(module, name, UNSEEN_SIZES) for name in PEFT_SHARED)
    shaped(module, randlora_lambda=(None, None), randlora_gamma=(None, None))
    r, bases = lambda_.shape
    shaped(module, randlora_gamma=(bases, None), randlora_A=(r, 1, None), randlora_B=(None, None, r))
    if b.shape[1] < bases or a.shape[2] < gamma.shape[1]:
        shaped(module, randlora_gamma=(b.shape[1], a.shape[2]))
    return {"": RandLoRA(a, b, lambda_, gamma, number(module, "randlora_alpha"), "config")}
