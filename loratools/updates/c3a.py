"""C3A: `dW` of circulant blocks, `dW[m b + i, n b + j] = kernel[m, n, (j - i) mod b] / in`.

Chen et al., 2024, https://arxiv.org/abs/2407.19342.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.peft_fields import shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("c3a_kernel",)
PEFT_FIELDS = ("block_size", "block_size_pattern", "init_weights")


@dataclass(frozen=True)
class C3A(NoAlpha):
    """A C3A update: a delta made of circulant blocks.

    Attributes:
        kernel: The first column of every block, unread: (out / b, in / b, b) for blocks of b by b.
    """

    kind: ClassVar[str] = "c3a"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = False
    whole_delta: ClassVar[bool] = True

    kernel: LazyTensor

    @property
    def shape(self) -> Shape:
        m, n, b = self.kernel.shape
        return m * b, n * b

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"kernel": self.kernel}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        m, n, b = self.kernel.shape
        kernel = read_array(self.kernel, "F64") / (n * b)
        shift = (np.arange(b)[None, :] - np.arange(b)[:, None]) % b
        blocks = kernel[:, :, shift]  # (m, n, output, input)
        return dense(blocks.transpose(0, 2, 1, 3).reshape(m * b, n * b), weight, dtype)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    FormatError: the kernel has another shape.
    """
    (kernel,) = module.need(*PEFT_PARTS)
    shaped(module, c3a_kernel=(None, None, None))
    return {"": C3A(kernel)}
