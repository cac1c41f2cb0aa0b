"""RoAd: `W' = R W`, `bias' = R bias`, R rotating and stretching pairs of outputs.

Liao and Monz, 2024, https://arxiv.org/abs/2409.00119. Outputs i and i + group / 2 of a group are a pair:
`W'_i = c_i W_i - s_i W_j`, `W'_j = c_j W_j + s_j W_i`, with c = alpha cos(theta), s = alpha sin(theta).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.peft_fields import chosen, integer, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats

PEFT_PARTS = ("road_theta", "road_alpha")
PEFT_FIELDS = ("variant", "group_size", "init_weights")
# Trained numbers for one output: shared by a pair, one for each, or one for the cosine and one for the sine.
_FOR_ONE = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


@dataclass(frozen=True)
class RoAd(NoAlpha):
    """A RoAd update: pairs of outputs rotated and stretched.

    Attributes:
        theta: The angles in radians, unread; as many as the variant has.
        stretch: The factors of length, unread; as many as the variant has.
        variant: The variant by the name that PEFT gives it.
        group: How many outputs lie in a group; outputs i and i + group / 2 are a pair.
        bias: Whether it is of a bias, which is rotated as a column of the weight is.
    """

    kind: ClassVar[str] = "road"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    theta: LazyTensor
    stretch: LazyTensor
    variant: str
    group: int
    bias: bool = False

    @property
    def optional(self) -> bool:
        """Whether a base need not have this weight: a layer without bias."""
        return self.bias

    @property
    def shape(self) -> Shape:
        out = int(self.theta.elements / _FOR_ONE[self.variant])
        return (out,) if self.bias else (out, None)

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"theta": self.theta, "stretch": self.stretch}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: it depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        cosine, sine = self._rotation()
        values = read_array(base, "F64").reshape(base.shape[0], -1)
        # (groups, 2, pairs, columns): both of a pair in the same place of their half.
        first, second = values.reshape(-1, 2, self.group // 2, values.shape[1]).swapaxes(0, 1)
        crossed = np.stack([-second, first], axis=1).reshape(values.shape)
        return dense((cosine - 1)[:, None] * values + sine[:, None] * crossed, weight, dtype)

    def _rotation(self) -> tuple[Floats, Floats]:
        """Cosines and sines, stretched, one for each output."""
        import numpy as np

        theta, stretch = read_array(self.theta, "F64"), read_array(self.stretch, "F64")
        if self.variant == "road_4":
            (for_cosine, for_sine), (by_cosine, by_sine) = (
                x.reshape(-1, 2, self.group).swapaxes(0, 1).reshape(2, -1) for x in (theta, stretch)
            )
            return by_cosine * np.cos(for_cosine), by_sine * np.sin(for_sine)
        if self.variant == "road_1":
            theta, stretch = (np.repeat(x.reshape(-1, self.group // 2), 2, axis=0).ravel() for x in (theta, stretch))
        return stretch * np.cos(theta), stretch * np.sin(theta)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: a variant not known here.
    FormatError: parts are missing, or do not fit each other or the size of the groups.
    """
    theta, stretch = module.need(*PEFT_PARTS)
    shaped(module, road_theta=(None,), road_alpha=theta.shape)
    variant, group = chosen(module, "variant", tuple(_FOR_ONE), "road_1"), integer(module, "group_size", 64)
    update = RoAd(theta, stretch, variant, group)
    out = update.shape[0]
    if group < 2 or group % 2 or not out or out % group or theta.elements != out * _FOR_ONE[variant]:
        raise FormatError(f"'{module.name}' has {theta.elements} angles, which are no groups of {group} ({variant})")
    return {"": update, ".bias": RoAd(theta, stretch, variant, group, bias=True)}
