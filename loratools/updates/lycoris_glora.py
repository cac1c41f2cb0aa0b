"""GLoRA of LyCORIS: the weight times a low-rank matrix, and another added, `dW = scale * (W @ A1 @ A2 + B1 @ B2)`.

Chavan et al., 2023, https://arxiv.org/abs/2306.07967, as Yeh et al., 2023 (LyCORIS) simplify it. Early versions
stored the factors the other way round, `dW = scale * (W @ A2 @ A1 + B2 @ B1)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import UnsupportedError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.loha import through_core
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.deltas import FactorDelta
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.protocol import Delta, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

LYCORIS_PARTS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")


@dataclass(frozen=True)
class LycorisGLoRA(UpdateDefaults):
    """A GLoRA update as LyCORIS has it: the weight times a low-rank matrix, and another added.

    Attributes:
        a1: The left factor of A, unread: (in, rank).
        a2: The right factor of A, unread: (rank, in).
        b1: The left factor of B, unread: (out, rank), with axes of 1 as a kernel has.
        b2: The right factor of B, unread: (rank, in, *kernel), or (rank, in) where there is a core.
        alpha: The number that the scale is made of, as stored.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        core: The core between the factors of B, unread: (rank, rank, *kernel). None if there is none.
    """

    kind: ClassVar[str] = "lycoris-glora"
    needs_base: ClassVar[bool] = True

    a1: LazyTensor
    a2: LazyTensor
    b1: LazyTensor
    b2: LazyTensor
    alpha: float
    alpha_source: str
    core: LazyTensor | None = None

    @property
    def rank(self) -> int:
        return self.a1.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b1.shape[0], self.a1.shape[0], *(self.core or self.b2).shape[2:]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        factors = {"a1": self.a1, "a2": self.a2, "b1": self.b1, "b2": self.b2}
        return factors | ({"core": self.core} if self.core is not None else {})

    @property
    def assumes_alpha(self) -> bool:
        return self.alpha_source == "assumed"

    def with_alpha(self, alpha: float) -> LycorisGLoRA:
        return replace(self, alpha=alpha, alpha_source="config") if self.assumes_alpha else self

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and shape[:2] == self.shape[:2] and math.prod(shape) == math.prod(self.shape)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        kind = np.float64 if dtype == "F64" else np.float32
        out, inputs, kernel = base.shape[0], base.shape[1], math.prod(base.shape[2:])
        a1, a2, b1, b2 = (read_array(t, "F64") for t in (self.a1, self.a2, self.b1, self.b2))
        a1, a2, b1, b2 = (t.reshape(len(t), -1) for t in (a1, a2, b1, b2))
        if self.core is not None:
            b2 = through_core(read_array(self.core, "F64"), b2)
        # The matrix works on the inputs of each element of the kernel alike.
        values = read_array(base, "F64").reshape(out, inputs, kernel)
        base_times_a = np.einsum("oik,ir->ork", values, a1).reshape(out, -1)
        b = np.concatenate([base_times_a, b1], axis=1) * (self.scale * weight)
        a = np.concatenate([np.kron(a2, np.eye(kernel)), b2])
        return FactorDelta(b.astype(kind), a.astype(kind))


def from_lycoris(parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
    """The module's update, of linear layers and convolutions, in either layout. alpha: None or 0 for the rank.

    Raises:
        UnsupportedError: The layout is ambiguous, as all four factors are square.
    """
    if missing := [part for part in LYCORIS_PARTS[:4] if part not in parts]:
        raise faulty(name, f"has {', '.join(sorted(parts))} without {', '.join(missing)}")
    a1, a2, b1, b2 = (parts[part] for part in LYCORIS_PARTS[:4])
    if any(len(t.shape) < 2 for t in (a1, a2, b1, b2)):
        raise faulty(name, "has factors that are no matrices")
    in_present_order = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0] and a1.shape[0] == a2.shape[1]
    in_former_order = a2.shape[1] == a1.shape[0] == b2.shape[1] == b1.shape[0] and a2.shape[0] == a1.shape[1]
    if in_present_order and in_former_order:
        # Layers with as many outputs as inputs: what is smaller is the rank.
        if a1.shape[0] == a1.shape[1]:
            raise UnsupportedError(
                f"'{name}' has factors that are all {a1.shape[0]} x {a1.shape[0]}, of which the order cannot be told",
                hint="early versions of LyCORIS stored them the other way round; a rank below the size would tell",
            )
        in_present_order = a1.shape[0] > a1.shape[1]
    elif not in_present_order and not in_former_order:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise faulty(name, f"has factors that make no product: {shapes}")
    if not in_present_order:
        a1, a2, b1, b2 = a2, a1, b2, b1
    core = parts.get("bm.weight")
    kernels = [t.shape[2:] for t in (a1, a2, b1, *([b2] if core is not None else []))]
    rank = a1.shape[1]
    if (
        b2.shape[1] != a1.shape[0]
        or any(size != 1 for kernel in kernels for size in kernel)
        or (core is not None and core.shape[:2] != (rank, rank))
    ):
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise faulty(name, f"has factors of layers of different sizes: {shapes}")
    alpha_value, origin = alpha or float(rank), "tensor" if alpha else "assumed"
    return {"": LycorisGLoRA(a1, a2, b1, b2, alpha_value, origin, core)}
