"""LoKr: the Kronecker product of two matrices, each whole or low rank, `dW = scale * kron(W1, W2)`.

Edalati et al., 2022 (KronA), https://arxiv.org/abs/2212.10650; Yeh et al., 2023 (LyCORIS),
https://arxiv.org/abs/2309.14859, for convolutions also with a core in W2 (Tucker).
PEFT divides alpha by its rank always; LyCORIS does not scale where both matrices are whole, whatever alpha says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import rows
from loratools.updates.loha import through_core
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.deltas import KroneckerDelta, dense
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.magnitude import magnitude_axis, with_magnitude
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PEFT_FIELDS = (
    "alpha",
    "rank_dropout",
    "module_dropout",
    "use_effective_conv2d",
    "decompose_both",
    "decompose_factor",
    "rank_dropout_scale",
    "init_weights",
)
# PEFT's default, where the config has none.
_PEFT_RANK = 8


@dataclass(frozen=True)
class LoKr(UpdateDefaults):
    """A LoKr update: the Kronecker product of two matrices.

    W1 is (a, c), W2 is (b, d, *kernel), and the weight is (a b, c d, *kernel).

    Attributes:
        stored: The stored parts by name, unread: `w1`, or `w1_a: (a, rank)` and `w1_b: (rank, c)`; `w2`, or `w2_a: (b,
            rank)` and `w2_b: (rank, d x kernel)`, or with a core `w2_a: (rank, b)`, `w2_b: (rank, d)` and `t2: (rank,
            rank, *kernel)`.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        rank: What alpha is divided by.
        unscaled: Whether alpha does not count, as both matrices are stored without factors.
        interleaved: Whether W2 is (b, d, kernel) of a Conv1d in PEFT, which takes its Kronecker product with (1, a, c).
        magnitude: The magnitude of DoRA: one number for each output, or for each input where `magnitude_of` is `in`.
            None if there is none.
        magnitude_of: Out, or in (LyCORIS before 3.2).
    """

    kind: ClassVar[str] = "lokr"

    stored: Mapping[str, LazyTensor]
    alpha: float
    alpha_source: str
    rank: int
    unscaled: bool = False
    interleaved: bool = False
    magnitude: LazyTensor | None = None
    magnitude_of: Literal["out", "in"] = "out"

    @property
    def _first(self) -> tuple[int, int]:
        if "w1" in self.stored:
            return self.stored["w1"].shape[0], self.stored["w1"].shape[1]
        return self.stored["w1_a"].shape[0], self.stored["w1_b"].shape[1]

    @property
    def _second(self) -> tuple[int, ...]:
        if "w2" in self.stored:
            return self.stored["w2"].shape
        a, b = self.stored["w2_a"].shape, self.stored["w2_b"].shape
        return (a[1], b[1], *self.stored["t2"].shape[2:]) if "t2" in self.stored else (a[0], *b[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """With its kernel where W2 has one, and (out, in x kernel) where that is flattened, which tells less."""
        (a, c), (b, d, *kernel) = self._first, self._second
        return a * b, c * d, *kernel

    @property
    def scale(self) -> float:
        return 1.0 if self.unscaled else self.alpha / self.rank

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {**self.stored, **({"magnitude": self.magnitude} if self.magnitude is not None else {})}

    @property
    def needs_base(self) -> bool:
        return self.magnitude is not None

    @property
    def assumes_alpha(self) -> bool:
        return self.alpha_source == "assumed" and not self.unscaled

    def with_alpha(self, alpha: float) -> LoKr:
        return replace(self, alpha=alpha, alpha_source="config") if self.assumes_alpha else self

    def lycoris_parts(self) -> Mapping[str, LazyTensor] | None:
        # With both matrices whole, LyCORIS does not scale; and there is one layout of a kernel that only PEFT has.
        both_unfactored = "w1" in self.stored and "w2" in self.stored
        return None if self.interleaved or (both_unfactored and self.scale != 1) else self.parts

    def fits(self, shape: tuple[int, ...]) -> bool:
        update_shape = self.shape
        if len(shape) < 2 or shape[0] != update_shape[0] or (len(update_shape) > 2 and shape[1] != update_shape[1]):
            return False
        if self.magnitude is not None and self.magnitude.elements != shape[0 if self.magnitude_of == "out" else 1]:
            return False
        return math.prod(shape) == math.prod(update_shape)

    def cut_rows(self, start: int, stop: int) -> LoKr | None:
        """Rows of W1, each of which makes as many outputs as W2 has rows: cut between them, or not at all."""
        each = self._second[0]
        if self.interleaved or self.magnitude_of == "in" or start % each or stop % each:
            return None
        name = "w1" if "w1" in self.stored else "w1_a"
        stored = {**self.stored, name: rows(self.stored[name], start // each, stop // each)}
        magnitude = None if self.magnitude is None else rows(self.magnitude, start, stop)
        return replace(self, stored=stored, magnitude=magnitude)

    def factors(self) -> Factors | None:
        """Return the factors of the delta.

        `kron(B1, B2) @ kron(A1, A2)`, with an identity for a matrix that is whole; None if both are.
        """
        import numpy as np
        import torch

        from loratools.algebra.lowrank import Factors

        both_unfactored = "w1" in self.stored and "w2" in self.stored
        if both_unfactored or self.interleaved or self.magnitude is not None:
            return None
        first, second = self._pair("w1"), self._pair("w2")
        b = np.kron(first[0], second[0]) * self.scale
        return Factors(torch.from_numpy(b), torch.from_numpy(np.kron(first[1], second[1])))

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        b1, a1 = self._pair("w1")
        b2, a2 = self._pair("w2")
        w1, w2 = b1 @ a1, b2 @ a2
        if self.interleaved:
            values = np.kron(w1[None], w2.reshape(self._second)).reshape(base.shape[0], -1)
            return dense(values, self.scale * weight, dtype)
        if self.magnitude is None:
            kind = np.float64 if dtype == "F64" else np.float32
            return KroneckerDelta((w1 * (self.scale * weight)).astype(kind), w2.astype(kind))
        by: Literal["row", "column"] = "row" if self.magnitude_of == "out" else "column"
        product = KroneckerDelta(w1 * self.scale, w2)
        kernel = math.prod(base.shape[2:])
        return with_magnitude(product, self.magnitude, base, by=by, repeat=kernel, weight=weight, dtype=dtype)

    def _pair(self, name: str) -> tuple[Floats, Floats]:
        """Factors of W1 or of W2 as a matrix, in float64; the smaller identity for one of them where it is whole."""
        import numpy as np

        if name in self.stored:
            unfactored = read_array(self.stored[name], "F64")
            unfactored = unfactored.reshape(len(unfactored), -1)
            rows, columns = unfactored.shape
            return (unfactored, np.eye(columns)) if columns <= rows else (np.eye(rows), unfactored)
        left, right = (read_array(self.stored[f"{name}_{side}"], "F64") for side in "ab")
        if name == "w2" and "t2" in self.stored:
            return left.T, through_core(read_array(self.stored["t2"], "F64"), right)
        return left, right.reshape(len(right), -1)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers and convolutions, in all factorings; the rank that alpha is divided by is the config's."""
    stored = _stored(module.parts, module.name)
    interleaved = "w2" in stored and len(stored["w2"].shape) == 3
    rank = module.rank or _PEFT_RANK
    return {"": LoKr(stored, module.alpha, module.alpha_source, rank, interleaved=interleaved)}


def from_lycoris(parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
    """The module's update. alpha: the stored one; None or 0 for the rank. It does not count where both are whole."""
    stored = _stored(parts, name)
    factor = stored.get("w2_b", stored.get("w1_b"))
    rank = factor.shape[0] if factor is not None else 1
    alpha_value, origin = alpha or float(rank), "tensor" if alpha else "assumed"
    update = LoKr(stored, alpha_value, origin, rank, factor is None)
    if (scale := parts.get("dora_scale")) is None:
        return {"": update}
    axis = magnitude_axis(scale, update.shape[0], name)
    return {"": LoKr(stored, alpha_value, origin, rank, factor is None, magnitude=scale, magnitude_of=axis)}


def _stored(parts: Mapping[str, LazyTensor], name: str) -> dict[str, LazyTensor]:
    """The parts without their prefix, checked to make two matrices."""
    stored = {part.removeprefix("lokr_"): tensor for part, tensor in parts.items() if part in PEFT_PARTS}
    missing = []
    for matrix in ("w1", "w2"):
        if matrix not in stored:
            missing += [f"lokr_{matrix}_{side}" for side in "ab" if f"{matrix}_{side}" not in stored]
    if missing:
        raise faulty(name, f"has {', '.join(sorted(parts))} without {', '.join(missing)}")
    wrong = [part for part, tensor in stored.items() if len(tensor.shape) < 2]
    for matrix in ("w1", "w2"):
        if matrix in stored:
            wrong += [f"{part}, which is beside {matrix}" for part in stored if part.startswith(f"{matrix}_")]
            continue
        a, b = stored[f"{matrix}_a"].shape, stored[f"{matrix}_b"].shape
        core = stored["t2"].shape if matrix == "w2" and "t2" in stored else None
        if not wrong and (a[1] if core is None else a[0]) != b[0]:
            wrong.append(f"{matrix}_a {list(a)} and {matrix}_b {list(b)}")
        elif not wrong and core is not None and core[:2] != (b[0], b[0]):
            wrong.append(f"t2 {list(core)} of rank {b[0]}")
    if "t2" in stored and "w2" in stored:
        wrong.append("t2, which is beside w2")
    if wrong:
        raise faulty(name, f"has parts that make no product: {', '.join(wrong)}")
    return stored
