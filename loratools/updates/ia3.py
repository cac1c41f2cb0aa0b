"""IA3: every output or every input multiplied by a number, `W' = diag(l) W` or `W' = W diag(l)`.

Liu et al., 2022, https://arxiv.org/abs/2205.05638. PEFT multiplies the bias with the outputs as well and starts at 1;
LyCORIS leaves the bias alone and stores how far from 1 the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import FactorDelta, HadamardDelta, ScaledDelta
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("ia3_l",)
PEFT_FIELDS = ("feedforward_modules", "init_ia3_weights")
LYCORIS_PARTS = ("weight", "on_input")


@dataclass(frozen=True)
class IA3(NoAlpha):
    """An IA3 update: every output or every input multiplied by a number.

    Attributes:
        scales: One number for each output or input, unread, in any shape.
        of: Whether outputs (`out`) or inputs (`in`) are multiplied.
        axes: Axes of the weight: 1 for a bias, 2 for a linear layer, more for convolutions.
        unchanged: The stored number that leaves the weight as it is: 1 in PEFT, 0 in LyCORIS.
        optional: Whether a base may lack this weight, as a layer without bias does.
    """

    kind: ClassVar[str] = "ia3"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    scales: LazyTensor
    of: Literal["out", "in"]
    axes: int
    unchanged: float = 1.0
    optional: bool = False

    @property
    def shape(self) -> Shape:
        known_axes: Shape = (self.scales.elements,) if self.of == "out" else (None, self.scales.elements)
        return known_axes + (None,) * (self.axes - len(known_axes))

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"scales": self.scales}

    def lycoris_parts(self) -> Mapping[str, LazyTensor] | None:
        """PEFT stores the numbers themselves, LyCORIS how far they are from 1."""
        import torch

        if self.unchanged != 0:
            return None
        return {"weight": self.scales, "on_input": from_torch(torch.tensor(int(self.of == "in")))}

    def fits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != self.axes:
            return False
        if self.of == "out":
            return shape[0] == self.scales.elements
        groups = self._groups(shape)
        return groups == 1 or (groups > 1 and self.axes > 2 and shape[0] % groups == 0)

    def _groups(self, shape: tuple[int, ...]) -> int:
        """Of a convolution, whose weight has the channels of one group only; 0 where they do not divide them."""
        return 0 if not shape[1] or self.scales.elements % shape[1] else self.scales.elements // shape[1]

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        kind = np.float64 if dtype == "F64" else np.float32
        by = ((read_array(self.scales, "F64").reshape(-1) - self.unchanged) * weight).astype(kind)
        matrix = base.shape[0], math.prod(base.shape[1:])
        if self.of == "out":
            return ScaledDelta(by, None, None, matrix)
        groups, kernel = self._groups(base.shape), math.prod(base.shape[2:])
        if groups == 1:
            return ScaledDelta(None, np.repeat(by, kernel), None, matrix)
        # Outputs of one group see the channels of that group.
        member = np.repeat(np.eye(groups, dtype=kind), base.shape[0] // groups, axis=0)
        return HadamardDelta(FactorDelta(member, np.repeat(by.reshape(groups, -1), kernel, axis=1)))


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Linear layers and convolutions; with the outputs, the bias where the layer has one."""
    (scales,) = module.need("ia3_l")
    sizes = scales.shape
    if len(sizes) < 2 or scales.elements != max(sizes):
        raise faulty(module.name, f"has ia3_l {list(sizes)}: a number for each output or each input is needed")
    if len(sizes) == 2 and scales.elements > 1:
        inputs = sizes[0] == 1
    else:
        # Convolutions store both in one shape; there the config tells.
        inputs = _is_feedforward(module)
    update = IA3(scales, "in" if inputs else "out", len(sizes))
    return {"": update} if inputs else {"": update, ".bias": IA3(scales, "out", 1, optional=True)}


def _is_feedforward(module: PeftModule) -> bool:
    listed = module.config.get("feedforward_modules")
    if isinstance(listed, str):
        return module.name in module.regexes.matching(listed, subject="feedforward_modules")
    return isinstance(listed, list) and any(module.name.endswith(str(entry)) for entry in listed)


def from_lycoris(parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
    """The module's update, of linear layers and convolutions alike; there is no alpha in it."""
    if missing := [part for part in LYCORIS_PARTS if part not in parts]:
        raise faulty(name, f"has {', '.join(sorted(parts))} without {', '.join(missing)}")
    if parts["on_input"].elements != 1:
        raise faulty(name, f"has on_input {list(parts['on_input'].shape)}; one number is needed")
    scales = parts["weight"]
    return {"": IA3(scales, "in" if parts["on_input"].scalar() else "out", max(2, len(scales.shape)), unchanged=0.0)}
