"""OFT of LyCORIS: the outputs rotated in blocks, once (diag-OFT) or in several stages (BOFT), and scaled if wanted.

Qiu et al., 2023, https://arxiv.org/abs/2306.07280, and Liu et al., 2024, https://arxiv.org/abs/2311.06243, as Yeh et
al., 2023 (LyCORIS) store them: `R = (I + Q)(I - Q)^-1` with `Q = X - X'`. What is called alpha there is no scale but a
bound of Q: above alpha times the number of outputs, all of Q is cut down to that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import NoAlpha
from loratools.updates.parts.deltas import dense
from loratools.updates.parts.faults import faulty
from loratools.updates.parts.protocol import Delta, Shape, Update
from loratools.updates.parts.rotations import cayley

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats


@dataclass(frozen=True)
class LycorisOFT(NoAlpha):
    """An OFT or BOFT update as LyCORIS has it: the outputs rotated in blocks, and scaled.

    Attributes:
        blocks: Entries of the rotations, unread: (count, size, size), or (stages, count, size, size) of BOFT.
        rescale: One factor for each output, unread; None if outputs are not scaled.
        constraint: The bound of the norm of Q, divided by the number of outputs; 0 if there is no bound.
    """

    kind: ClassVar[str] = "lycoris-oft"
    rank: ClassVar[None] = None
    needs_base: ClassVar[bool] = True

    blocks: LazyTensor
    rescale: LazyTensor | None = None
    constraint: float = 0.0

    @property
    def shape(self) -> Shape:
        return self.blocks.shape[-3] * self.blocks.shape[-1], None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {"blocks": self.blocks, **({"rescale": self.rescale} if self.rescale is not None else {})}

    def lycoris_alpha(self) -> float:
        """The bound of the rotation."""
        return self.constraint

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and shape[0] == self.shape[0]

    def factors(self) -> Factors | None:
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import numpy as np

        values = read_array(base, "F64").reshape(base.shape[0], -1)
        rotations = self._rotations(base.shape[0])
        if rotations.ndim == 3:
            count, size, _ = rotations.shape
            merged = np.einsum("knm,knc->kmc", rotations, values.reshape(count, size, -1), optimize=True)
        else:
            merged = values
            for stage, blocks in enumerate(rotations):
                merged = _butterfly(blocks, merged, (1 << stage) * (blocks.shape[-1] // 2))
        merged = merged.reshape(values.shape)
        if self.rescale is not None:
            merged = merged * read_array(self.rescale, "F64").reshape(-1, 1)
        return dense(merged - values, weight, dtype)

    def _rotations(self, out: int) -> Floats:
        """R, in the shape of the blocks."""
        import numpy as np

        raw = read_array(self.blocks, "F64")
        skew = raw - raw.swapaxes(-1, -2)
        norm = float(np.sqrt(np.square(skew).sum())) + 1e-8
        if self.constraint > 0 and norm > self.constraint * out:
            skew *= self.constraint * out / norm
        # The other way round than PEFT's: the map of -Q.
        return cayley(-skew)


def _butterfly(blocks: Floats, values: Floats, apart: int) -> Floats:
    """One stage: outputs that lie `apart` are brought next to each other, rotated in blocks, and brought back."""
    import numpy as np

    out, columns = values.shape
    count, size, _ = blocks.shape
    paired = values.reshape(-1, 2, apart, columns).swapaxes(1, 2).reshape(count, size, columns)
    rotated = np.einsum("bij,bjc->bic", blocks, paired, optimize=True)
    back: Floats = rotated.reshape(-1, apart, 2, columns).swapaxes(1, 2).reshape(out, columns)
    return back


def from_lycoris(parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
    """The module's update, of linear layers and convolutions. alpha: the stored one, which is the bound."""
    blocks, rescale = parts.get("oft_blocks"), parts.get("rescale")
    if blocks is None:
        raise faulty(name, f"has {', '.join(sorted(parts))} without oft_blocks")
    sizes = blocks.shape
    if len(sizes) not in (3, 4) or sizes[-1] != sizes[-2] or not math.prod(sizes):
        raise faulty(name, f"has oft_blocks {list(sizes)}: square blocks are needed, in one or several stages")
    if len(sizes) == 4 and (sizes[-1] % 2 or sizes[1] % (1 << (sizes[0] - 1))):
        raise faulty(name, f"has {sizes[1]} blocks of {sizes[-1]}, too odd for {sizes[0]} stages")
    if rescale is not None and rescale.elements != sizes[-3] * sizes[-1]:
        raise faulty(name, f"has {rescale.elements} numbers in rescale for {sizes[-3] * sizes[-1]} outputs")
    return {"": LycorisOFT(blocks, rescale, alpha or 0.0)}
