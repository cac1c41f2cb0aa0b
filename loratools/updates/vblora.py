"""VB-LoRA: `dW = B @ A`, each piece of a factor a mixture of a few vectors of one bank that all modules share.

Li et al., 2024, https://arxiv.org/abs/2405.15179. A piece takes the `topk` vectors of largest logit, weighted by the
softmax over these; saved are the logits, or the chosen vectors with all weights but the last, which is what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.indices import read_indices
from loratools.updates.parts.low_rank import LowRank
from loratools.updates.parts.peft_fields import integer, shaped, shared
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

_PARTS = ("logits_{}", "logits_{}_topk_indices", "logits_{}_topk_weights")
PEFT_PARTS = tuple(f"vblora_{part.format(side)}" for side in "AB" for part in _PARTS)
PEFT_SHARED = ("vblora_vector_bank",)
PEFT_FIELDS = (
    "num_vectors",
    "vector_length",
    "topk",
    "save_only_topk_weights",
    "vblora_dropout",
    "init_vector_bank_bound",
    "init_logits_std",
)


@dataclass(frozen=True)
class Mixtures:
    """The mixtures that the pieces of one factor are: by logits, or by chosen vectors and their weights.

    Attributes:
        topk: How many vectors of the bank a piece is mixed of.
        logits: The logits, unread: (m, n, vectors). None if the choice is stored.
        chosen: Numbers of the chosen vectors, unread: (m, n, topk). None if logits are stored.
        weights: All weights of the chosen vectors but the last, unread: (m, n, topk - 1). None if logits are stored.
    """

    topk: int
    logits: LazyTensor | None = None
    chosen: LazyTensor | None = None
    weights: LazyTensor | None = None

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        tensors_by_name = {"logits": self.logits, "chosen": self.chosen, "weights": self.weights}
        return {name: tensor for name, tensor in tensors_by_name.items() if tensor is not None}

    @property
    def pieces(self) -> tuple[int, int]:
        m, n, _ = next(iter(self.tensors.values())).shape
        return m, n

    def mixed(self, bank: Floats) -> Floats:
        """Return the mixed pieces: (m, n, length of a vector)."""
        import numpy as np

        if self.logits is not None:
            logits = read_array(self.logits, "F64")
            chosen = np.argsort(-logits, axis=-1, kind="stable")[..., : self.topk]
            largest = np.take_along_axis(logits, chosen, axis=-1)
            weights = np.exp(largest - largest[..., :1])
            weights /= weights.sum(axis=-1, keepdims=True)
        else:
            assert self.chosen is not None
            assert self.weights is not None
            chosen = read_indices(self.chosen, bank.shape[0], "the vectors chosen by VB-LoRA")
            stored_weights = read_array(self.weights, "F64")
            weights = np.concatenate([stored_weights, 1 - stored_weights.sum(axis=-1, keepdims=True)], axis=-1)
        mixed: Floats = np.einsum("mnk,mnkl->mnl", weights, bank[chosen])
        return mixed


@dataclass(frozen=True)
class VBLoRA(NoAlpha, LowRank):
    """A VB-LoRA update: factors whose pieces are mixed from one bank of vectors.

    Attributes:
        bank: The bank, shared by all modules, unread: (vectors, length).
        a: The pieces of A: (rank, in / length).
        b: The pieces of B: (out / length, rank).
    """

    kind: ClassVar[str] = "vblora"

    bank: LazyTensor
    a: Mixtures
    b: Mixtures

    @property
    def rank(self) -> int:
        return self.a.pieces[0]

    @property
    def shape(self) -> Shape:
        length = self.bank.shape[1]
        return self.b.pieces[0] * length, self.a.pieces[1] * length

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        mixtures = {f"{name}_{side}": t for side, m in (("A", self.a), ("B", self.b)) for name, t in m.tensors.items()}
        return {"bank": self.bank, **mixtures}

    def matrices(self, rows: int, columns: int) -> tuple[Floats, Floats]:
        bank = read_array(self.bank, "F64")
        b = self.b.mixed(bank).transpose(0, 2, 1).reshape(rows, self.rank)
        return b, self.a.mixed(bank).reshape(self.rank, columns)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without the bank.
    FormatError: parts are missing, or do not fit each other.
    """
    bank = shared(module, "vblora_vector_bank", "it is trained")
    topk = integer(module, "topk", 2)
    mixtures = {}
    for side in "AB":
        logits, chosen, weights = (f"vblora_{part.format(side)}" for part in _PARTS)
        if chosen in module.parts or weights in module.parts:
            first, second = module.need(chosen, weights)
            shaped(module, **{chosen: (None, None, topk), weights: (*first.shape[:2], topk - 1)})
            mixtures[side] = Mixtures(topk, None, first, second)
        else:
            (logits_tensor,) = module.need(logits)
            shaped(module, **{logits: (None, None, bank.shape[0])})
            mixtures[side] = Mixtures(topk, logits_tensor)
    rank = mixtures["A"].pieces[0]
    name = next(iter(name for name in module.parts if name.startswith("vblora_logits_B")))
    shaped(module, vblora_vector_bank=(None, None), **{name: (None, rank, None)})
    return {"": VBLoRA(bank, mixtures["A"], mixtures["B"])}
