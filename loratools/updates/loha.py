"""LoHa: the entrywise product of two low-rank matrices, `dW = scale * (W1a @ W1b) o (W2a @ W2b)`.

Hyeon-Woo et al., 2021 (FedPara), https://arxiv.org/abs/2108.06098; for convolutions, also with a core in each of the
two (Tucker), Yeh et al., 2023 (LyCORIS), https://arxiv.org/abs/2309.14859. PEFT and LyCORIS define it in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from loratools.storage.arrays import read_array
from loratools.tensors.joined import block_diagonal, stacked
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import rows
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.deltas import FactorDelta, HadamardDelta
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.magnitude import magnitude_axis, with_magnitude
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
PEFT_FIELDS = ("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")


@dataclass(frozen=True)
class LoHa(UpdateDefaults):
    """A LoHa update: the entrywise product of two low-rank matrices.

    With a core the matrix is `sum_ij t[i, j, k] a[i, out] b[j, in]`. A magnitude is LyCORIS' DoRA on top of the
    product.

    Attributes:
        w1_a: The left factor of the first matrix, unread: (out, rank), or (rank, out) where it has a core.
        w1_b: The right factor of the first matrix, unread: (rank, in x kernel), or (rank, in) where it has a core.
        w2_a: The left factor of the second matrix, in the same forms.
        w2_b: The right factor of the second matrix, in the same forms.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        t1: The core of the first matrix, unread: (rank, rank, *kernel). None if there is none.
        t2: The core of the second matrix, in the same form.
        magnitude: The magnitude of DoRA: one number for each output, or for each input where `magnitude_of` is `in`.
            None if there is none.
        magnitude_of: Out, or in (LyCORIS before 3.2).
    """

    kind: ClassVar[str] = "loha"

    w1_a: LazyTensor
    w1_b: LazyTensor
    w2_a: LazyTensor
    w2_b: LazyTensor
    alpha: float
    alpha_source: str
    t1: LazyTensor | None = None
    t2: LazyTensor | None = None
    magnitude: LazyTensor | None = None
    magnitude_of: Literal["out", "in"] = "out"

    @property
    def rank(self) -> int:
        """Of each of the two; that of their product is up to its square."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with its kernel if there is a core; without a core it is (out, in x kernel), which is less
        specific.
        """
        if self.t1 is not None:
            return self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:]
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        factors = {"w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a, "w2_b": self.w2_b}
        more = {"t1": self.t1, "t2": self.t2, "magnitude": self.magnitude}
        return factors | {name: tensor for name, tensor in more.items() if tensor is not None}

    @property
    def needs_base(self) -> bool:
        return self.magnitude is not None

    @property
    def assumes_alpha(self) -> bool:
        return self.alpha_source == "assumed"

    def with_alpha(self, alpha: float) -> LoHa:
        return replace(self, alpha=alpha, alpha_source="config") if self.assumes_alpha else self

    def fits(self, shape: tuple[int, ...]) -> bool:
        update_shape = self.shape
        if len(shape) < 2 or shape[0] != update_shape[0] or (self.t1 is not None and shape[1] != update_shape[1]):
            return False
        if self.magnitude is not None and self.magnitude.elements != shape[0 if self.magnitude_of == "out" else 1]:
            return False
        return math.prod(shape) == math.prod(update_shape)

    def cut_rows(self, start: int, stop: int) -> LoHa | None:
        if self.t1 is not None or self.magnitude_of == "in":
            return None
        magnitude = None if self.magnitude is None else rows(self.magnitude, start, stop)
        w1_a, w2_a = (rows(a, start, stop) for a in (self.w1_a, self.w2_a))
        return replace(self, w1_a=w1_a, w2_a=w2_a, magnitude=magnitude)

    def stack_rows(self, others: Sequence[Update]) -> LoHa | None:
        """Block diagonals of the left factors and stacks of the right ones: outside of the blocks both products are 0.

        Scales that differ are multiplied into the first factor.
        """
        members = [self, *(other for other in others if isinstance(other, LoHa))]
        if len(members) <= len(others) or len({(m.shape[1], len(m.w1_b.shape)) for m in members}) > 1:
            return None
        if any(m.t1 is not None or m.magnitude is not None for m in members):
            return None
        scales = {m.scale for m in members}
        folded = [m.scale if len(scales) > 1 else 1.0 for m in members]
        rank = sum(m.rank for m in members)
        return replace(
            self,
            w1_a=block_diagonal([m.w1_a for m in members], folded),
            w1_b=stacked([m.w1_b for m in members]),
            w2_a=block_diagonal([m.w2_a for m in members]),
            w2_b=stacked([m.w2_b for m in members]),
            alpha=float(rank) if len(scales) > 1 else self.scale * rank,
        )

    def factors(self) -> Factors | None:
        """Of rank r^2: every column of one times every column of the other. None with a magnitude."""
        import numpy as np
        import torch

        from loratools.algebra.lowrank import Factors

        if self.magnitude is not None:
            return None
        (b1, a1), (b2, a2) = self._matrices(1.0)
        b = np.einsum("oi,oj->oij", b1, b2).reshape(len(b1), -1)
        a = np.einsum("in,jn->ijn", a1, a2).reshape(-1, a1.shape[1])
        return Factors(torch.from_numpy(b), torch.from_numpy(a))

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        if self.magnitude is None:
            kind = np.float64 if dtype == "F64" else np.float32
            first, second = (
                FactorDelta(b.astype(kind), np.ascontiguousarray(a, kind)) for b, a in self._matrices(weight)
            )
            return HadamardDelta(first, second)
        first, second = (FactorDelta(b, a) for b, a in self._matrices(1.0))
        by: Literal["row", "column"] = "row" if self.magnitude_of == "out" else "column"
        product = HadamardDelta(first, second)
        kernel = math.prod(base.shape[2:])
        return with_magnitude(product, self.magnitude, base, by=by, repeat=kernel, weight=weight, dtype=dtype)

    def _matrices(self, weight: float) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
        """`b: (out, rank)`, `a: (rank, in x kernel)` of both, in float64; scale and weight are in the first `b`."""
        b1, a1 = _product(self.w1_a, self.w1_b, self.t1)
        return (b1 * (self.scale * weight), a1), _product(self.w2_a, self.w2_b, self.t2)


def _product(a: LazyTensor, b: LazyTensor, core: LazyTensor | None) -> tuple[Floats, Floats]:
    left, right = read_array(a, "F64"), read_array(b, "F64")
    if core is None:
        return left, right.reshape(len(right), -1)
    return left.T, through_core(read_array(core, "F64"), right)


def through_core(core: Floats, right: Floats) -> Floats:
    """Multiply a factor with the core: `sum_j core[i, j, *kernel] right[j, in]` as (rank, in x kernel)."""
    import numpy as np

    product = np.tensordot(core, right, ([1], [0]))  # (rank, *kernel, in)
    return np.ascontiguousarray(np.moveaxis(product, -1, 1)).reshape(len(product), -1)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers and convolutions, these with or without cores (`use_effective_conv2d`)."""
    return {"": _from_lycoris_parts(module.parts, module.name, module.alpha, module.alpha_source)}


def from_lycoris(parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
    """The module's update. alpha: the stored one, which rs_lora is in already; None or 0 for the rank."""
    return {"": _from_lycoris_parts(parts, name, alpha, "tensor")}


def _from_lycoris_parts(parts: Mapping[str, LazyTensor], name: str, alpha: float | None, origin: str) -> LoHa:
    if missing := [part for part in PEFT_PARTS[:4] if part not in parts]:
        raise faulty(name, f"has {', '.join(sorted(parts))} without {', '.join(missing)}")
    w1_a, w1_b, w2_a, w2_b = (parts[part] for part in PEFT_PARTS[:4])
    t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
    cores = [tuple(t.shape[:2]) for t in (t1, t2) if t is not None]
    inner = (0 if cores else 1, 0)
    # A matrix has two axes; what has fewer adds no size, so that there are not four.
    sizes = [t.shape[i] for t, i in zip((w1_a, w1_b, w2_a, w2_b), inner * 2, strict=True) if len(t.shape) >= 2]
    if len(sizes) < 4 or len(set(sizes)) > 1 or cores not in ([], [(sizes[0], sizes[0])] * 2):
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise faulty(name, f"has parts that make no product: {shapes}")
    if w1_a.shape != w2_a.shape or w1_b.shape != w2_b.shape or (t1 and t1.shape) != (t2 and t2.shape):
        raise faulty(name, "has two products of different sizes, which have no entrywise product")
    update = LoHa(w1_a, w1_b, w2_a, w2_b, alpha or float(sizes[0]), origin if alpha else "assumed", t1, t2)
    if (scale := parts.get("dora_scale")) is None:
        return update
    axis = magnitude_axis(scale, update.shape[0], name)
    return LoHa(w1_a, w1_b, w2_a, w2_b, update.alpha, update.alpha_source, t1, t2, scale, axis)
