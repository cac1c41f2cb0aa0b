"""GLoRA: weights scaled entry by entry and added to, `W' = W + W o A + B` and `b' = b + b o D + E`, as PEFT trains it.

Chavan et al., 2023, https://arxiv.org/abs/2306.07967. A and B are products of low rank, one number for each output, one
number, or nothing. `lycoris-glora` is the other one, where A is multiplied with W as a matrix.
PEFT also adds `W C` to the bias: see `GLoRABias`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import FactorDelta, ScaledDelta, dense
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
PEFT_FIELDS = ("config_A_B", "config_C", "config_D_E", "init_weights")
# What PEFT stores for a path that is nothing, and does not train.
_NOTHING = "zeros"


@dataclass(frozen=True)
class GLoRA(NoAlpha):
    """A GLoRA update of a weight, as PEFT trains it: entries multiplied and added to.

    Attributes:
        multiplied: The parts of A: `{"Xd": (out, rank), "Xu": (rank, in)}`, `{"X": (out, 1)}`, `{"X": (1,)}`, or empty.
        added: The parts of B, in the same forms.
        sizes: Outputs and inputs of the layer, None if none of the five paths says.
    """

    kind: ClassVar[str] = "glora"
    needs_base: ClassVar[bool] = True

    multiplied: Mapping[str, LazyTensor]
    added: Mapping[str, LazyTensor]
    sizes: tuple[int | None, int | None] = (None, None)

    @property
    def rank(self) -> int | None:
        return self.multiplied["Xu"].shape[0] if "Xu" in self.multiplied else None

    @property
    def shape(self) -> Shape:
        return self.sizes

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return _named({"A": self.multiplied, "B": self.added})

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        out, columns = base.shape[0], math.prod(base.shape[1:])
        kind = np.float64 if dtype == "F64" else np.float32
        if "Xu" in self.multiplied:
            values = read_array(base, "F64").reshape(out, columns)
            b, a = _path(self.multiplied, out, columns)
            values *= b @ a
            b, a = _path(self.added, out, columns)
            return dense(values + b @ a, weight, dtype)
        by, _ = _path(self.multiplied, out, columns)
        b, a = _path(self.added, out, columns)
        added = FactorDelta((b * weight).astype(kind), a.astype(kind))
        return ScaledDelta((by[:, 0] * weight).astype(kind), None, added, (out, columns))


def _path(path: Mapping[str, LazyTensor], out: int, columns: int) -> tuple[Floats, Floats]:
    """Factors of what a path is for every entry: (out, rank) and (rank, columns), in float64."""
    import numpy as np

    if "Xu" in path:
        return read_array(path["Xd"], "F64"), read_array(path["Xu"], "F64")
    each = read_array(path["X"], "F64").reshape(-1, 1) if path else np.zeros((1, 1))
    return np.broadcast_to(each, (out, 1)), np.ones((1, columns))


@dataclass(frozen=True)
class GLoRABias(NoAlpha):
    """A GLoRA update of a bias: entries multiplied and added to, and a product of the weight added.

    Attributes:
        multiplied: The part D: `{"X": (out,)}`, `{"X": (1,)}`, or empty.
        added: The part E, in the same forms.
        through: The part C, which is multiplied with the weight: (in, 1), or a product that makes it; or empty.
        weight: The unmodified weight of the same layer, which C needs; None if it is not at hand.
    """

    kind: ClassVar[str] = "glora"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    multiplied: Mapping[str, LazyTensor]
    added: Mapping[str, LazyTensor]
    through: Mapping[str, LazyTensor] = field(default_factory=dict)
    weight: LazyTensor | None = None

    @property
    def shape(self) -> Shape:
        sizes = [path["X"].elements for path in (self.multiplied, self.added) if path and path["X"].elements > 1]
        return (sizes[0] if sizes else None,)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return _named({"C": self.through, "D": self.multiplied, "E": self.added})

    @property
    def reads_layer_weight(self) -> bool:
        return bool(self.through)

    def with_layer_weight(self, weight: LazyTensor) -> GLoRABias:
        return replace(self, weight=weight)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        (size,) = base.shape
        scales, _ = _path(self.multiplied, size, 1)
        added, _ = _path(self.added, size, 1)
        values = read_array(base, "F64").reshape(size, 1) * scales + added
        if self.through:
            assert self.weight is not None, "the merge gives the weight of the layer"
            values = values + read_array(self.weight, "F64") @ _column(self.through)
        return dense(values, weight, dtype)


def _column(path: Mapping[str, LazyTensor]) -> Floats:
    if "Xu" in path:
        product: Floats = read_array(path["Xd"], "F64") @ read_array(path["Xu"], "F64")
        return product
    return read_array(path["X"], "F64").reshape(-1, 1)


def _named(paths: Mapping[str, Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    return {f"{name}.{part}": tensor for name, path in paths.items() for part, tensor in path.items()}


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers, with every setting of the five paths; the bias where one of its own is set."""
    paths: dict[str, dict[str, LazyTensor]] = {name: {} for name in PEFT_PARTS}
    if missing := [name for name in PEFT_PARTS if not any(part.startswith(f"{name}.") for part in module.parts)]:
        raise faulty(module.name, f"has {', '.join(sorted(module.parts))} without {', '.join(missing)}")
    for part, tensor in module.parts.items():
        name, _, leaf = part.partition(".")
        if leaf not in ("Xd", "Xu", "X", _NOTHING):
            raise faulty(module.name, f"has {part}, which is no part of a path that PEFT writes")
        if leaf != _NOTHING:
            paths[name][leaf] = tensor
    wrong = [name for name, path in paths.items() if set(path) not in ({"Xd", "Xu"}, {"X"}, set())]
    wrong += [name for name in ("glora_D", "glora_E") if "Xu" in paths[name]]
    wrong += [n for n, path in paths.items() if "Xu" in path and path["Xd"].shape[-1] != path["Xu"].shape[0]]
    if wrong:
        raise faulty(module.name, f"has parts that make no path: {', '.join(sorted(set(wrong)))}")
    a, b, c, d, e = (paths[name] for name in PEFT_PARTS)
    updates: dict[str, Update] = {"": GLoRA(a, b, _sizes(module, paths))}
    if c or d or e:
        updates[".bias"] = GLoRABias(d, e, c)
    return updates


def _sizes(module: PeftModule, paths: Mapping[str, Mapping[str, LazyTensor]]) -> tuple[int | None, int | None]:
    """Outputs and inputs of the layer.

    Raises:
        FormatError: The paths are for layers of different sizes, or a factor is no matrix.
    """
    outputs: set[int] = set()
    inputs: set[int] = set()
    matrices = True
    for name, path in paths.items():
        rows, columns = (inputs, None) if name == "glora_C" else (outputs, inputs)
        if "Xu" in path:
            down, up = path["Xd"].shape, path["Xu"].shape
            matrices &= len(down) == len(up) == 2 and (columns is not None or up[1] == 1)
            rows.add(down[0])
            if columns is not None:
                columns.add(up[-1])
        elif "X" in path and (path["X"].elements > 1 or name == "glora_C"):
            rows.add(path["X"].elements)
    if not matrices or len(outputs) > 1 or len(inputs) > 1:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(module.parts.items()))
        raise faulty(module.name, f"has parts of layers of different sizes: {shapes}")
    return next(iter(outputs), None), next(iter(inputs), None)
