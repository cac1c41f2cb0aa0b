"""LoRA: `dW = scale * B @ A`, with a magnitude (DoRA) `m (W + dW) / |W + dW| - W`.

Hu et al., 2021, https://arxiv.org/abs/2106.09685. With rsLoRA (Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732) the scale is alpha / sqrt(rank) in place of alpha / rank.
DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353: the norm is of each output of the unmodified base plus dW.
LoCon: Yeh et al., 2023, https://arxiv.org/abs/2309.14859: convolutions, also with a core between B and A (Tucker).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from loratools.errors import FormatError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import without_unit_kernel
from loratools.updates.full import Full
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats


@dataclass(frozen=True)
class LoRA(UpdateDefaults):
    """A low-rank update: `dW = scale * B @ A`.

    Attributes:
        a: The factor A, unread: (rank, in) of a linear layer, (rank, in, *kernel) of a convolution.
        b: The factor B, unread: (out, rank), with as many axes of 1 as the kernel has, or none.
        alpha: As stored, since `(alpha / rank) * rank` is not always alpha in floating point. The rank is the tensors'.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        rslora: Whether the scale is alpha / sqrt(rank) and not alpha / rank.
        embedding: Whether a is (rank, tokens) and b is (width, rank), for a weight stored as (tokens, width).
        mid: A core between the factors, (rank, rank, *kernel), for `a: (rank, in, 1...)`: `dW[o, i, k] = b[o, p] mid[p,
            q, k] a[q, i]`. None if there is none.
        magnitude: The magnitude of DoRA: one number for each output, or for each input where `magnitude_of` is `in`.
        magnitude_of: Out, or in (LyCORIS before 3.2).

    Example:
        >>> import loratools
        >>> update = loratools.load("fixtures/llama-tiny-science").updates["model.layers.0.self_attn.q_proj"]
        >>> update.kind, update.rank, update.b.shape[0] == update.shape[0]
        ('lora', 16, True)
    """

    kind: ClassVar[str] = "lora"

    a: LazyTensor
    b: LazyTensor
    alpha: float
    alpha_source: str
    rslora: bool = False
    embedding: bool = False
    mid: LazyTensor | None = None
    magnitude: LazyTensor | None = None
    magnitude_of: Literal["out", "in"] = "out"

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.embedding:
            return self.a.shape[1], self.b.shape[0]
        kernel = self.mid.shape[2:] if self.mid is not None else self.a.shape[2:]
        return self.b.shape[0], self.a.shape[1], *kernel

    @property
    def scale(self) -> float:
        # A module of rank 0 (nothing changed there) has no scale.
        if self.rank == 0:
            return 0.0
        return lora_scale(self.alpha, self.rank, self.rslora)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        parts = {"A": self.a, "B": self.b}
        if self.mid is not None:
            parts["mid"] = self.mid
        if self.magnitude is not None:
            parts["magnitude"] = self.magnitude
        return parts

    @property
    def needs_base(self) -> bool:
        return self.magnitude is not None

    @property
    def assumes_alpha(self) -> bool:
        return self.alpha_source == "assumed"

    def with_alpha(self, alpha: float) -> LoRA:
        return replace(self, alpha=alpha, alpha_source="config") if self.assumes_alpha else self

    def as_lora(self) -> LoRA:
        return self

    def fits(self, shape: tuple[int, ...]) -> bool:
        own_shape = self.shape
        if len(own_shape) == len(shape) == 2:
            return own_shape == shape
        # A 1x1 convolution may be stored as a linear layer, and the other way round.
        return fits_shape(without_unit_kernel(own_shape), without_unit_kernel(shape))

    def factors(self) -> Factors | None:
        """None with a magnitude, whose delta depends on the base."""
        import torch

        from loratools.algebra.lowrank import Factors

        if self.magnitude is not None:
            return None
        b, a = self._matrices("F64")
        return Factors(torch.from_numpy(b), torch.from_numpy(a))

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        from loratools.updates.parts.deltas import FactorDelta
        from loratools.updates.parts.magnitude import with_magnitude

        b, a = self._matrices("F64" if self.magnitude is not None else dtype, weight if self.magnitude is None else 1.0)
        if self.magnitude is None:
            return FactorDelta(b, a)
        by: Literal["row", "column"] = "row" if (self.magnitude_of == "out") != self.embedding else "column"
        kernel = math.prod(self.shape[2:])
        return with_magnitude(FactorDelta(b, a), self.magnitude, base, by=by, repeat=kernel, weight=weight, dtype=dtype)

    def _matrices(self, dtype: str, weight: float = 1.0) -> tuple[Floats, Floats]:
        """`b: (rows, rank)`, `a: (rank, columns)` of the weight as a matrix; scale and weight are in `b`."""
        import numpy as np

        kind = np.float64 if dtype == "F64" else np.float32
        # The constant meets one factor in float64, so that it is rounded once and not once more for the constant.
        outer, inner = (self.a, self.b) if self.embedding else (self.b, self.a)
        left = read_array(outer, "F64")
        if self.mid is not None:
            down = read_array(inner, "F64").reshape(self.rank, -1)
            right = np.tensordot(read_array(self.mid, "F64"), down, ([1], [0]))
            right = np.moveaxis(right, -1, 1)  # (rank, *kernel, in) -> (rank, in, *kernel)
        else:
            right = read_array(inner, dtype)
        if self.embedding:
            left, right = left.T, right.T
        left = (left.reshape(left.shape[0], -1) * (self.scale * weight)).astype(kind)
        return left, np.ascontiguousarray(right.reshape(right.shape[0], -1), kind)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return the scale of a LoRA: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


PEFT_PARTS = ("lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers, convolutions and embeddings, with or without a magnitude, and the bias that B may have."""
    rslora = bool(module.config.get("use_rslora"))
    embedding = "lora_embedding_A" in module.parts
    a, b = module.need("lora_embedding_A", "lora_embedding_B") if embedding else module.need("lora_A", "lora_B")
    magnitude = module.parts.get("lora_magnitude_vector")
    if bool(module.config.get("use_dora")) != (magnitude is not None):
        raise FormatError(
            f"'{module.name}' has {'no' if magnitude is None else 'a'} lora_magnitude_vector, and use_dora is "
            f"{str(magnitude is None).lower()} in adapter_config.json",
            hint="save the adapter again; whether the weights were normalised in training cannot be guessed",
            defect="config-dora",
        )
    update = LoRA(a, b, module.alpha, module.alpha_source, rslora, embedding=embedding, magnitude=magnitude)
    if magnitude is not None and magnitude.elements != (update.shape[1] if embedding else update.shape[0]):
        raise FormatError(
            f"'{module.name}' has a magnitude of {magnitude.elements} numbers for {update.shape[0]} outputs",
            defect="shapes-factor",
        )
    updates: dict[str, Update] = {"": update}
    if (bias := module.parts.get("lora_B.bias")) is not None:
        updates[".bias"] = Full(bias, update.scale)
    return updates
