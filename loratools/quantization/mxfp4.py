"""MXFP4: 4-bit floats in blocks of 32 with a power of two each, as in gpt-oss.

    experts.gate_up_proj_blocks U8 (experts, rows, groups, 16)   experts.gate_up_proj_scales U8 (experts, rows, groups)

The lower half of a byte comes first. The model uses the transpose, (experts, in, out):

    W[e, 32 g + i, r] = E2M1[code[e, r, g, i]] * 2 ** (scales[e, r, g] - 127)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.parts import collect
from loratools.quantization.common.protocol import PackedWeight, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

_BLOCK = 32


@dataclass(frozen=True)
class ExpertBlocks:
    """Blocks of 32 4-bit floats, stored as (experts, out, in) and used as (experts, in, out)."""

    format: str = "mxfp4"
    bits: int = 4
    group: int = _BLOCK

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Experts start:stop as float32; exact in bfloat16, except for powers below its range."""
        import numpy as np

        from loratools.algebra.packing import decode_pairs, e2m1_pairs, e8m0, onto_grid
        from loratools.storage.arrays import read_raw

        values = decode_pairs(read_raw(weight.tensor("blocks"), start, stop), e2m1_pairs())
        values *= e8m0(read_raw(weight.tensor("scales"), start, stop))[..., None]
        experts, inputs, outputs = stop - start, *weight.shape[1:]
        transposed = values.reshape(experts, outputs, inputs).transpose(0, 2, 1)
        return onto_grid(np.ascontiguousarray(transposed), weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import E2M1, e8m0, unpack_bits
        from loratools.storage.arrays import read_raw

        experts, inputs, outputs = stop - start, *weight.shape[1:]
        codes = unpack_bits(read_raw(weight.tensor("blocks"), start, stop), 4).reshape(experts, outputs, inputs)
        scales = np.repeat(e8m0(read_raw(weight.tensor("scales"), start, stop)), _BLOCK, axis=-1)
        return LevelGrid(
            np.array(E2M1, np.float32), np.arange(16), codes.transpose(0, 2, 1), scales.transpose(0, 2, 1), weight.dtype
        )

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.packing import pack_bits

        stored = weight.tensor("blocks").shape
        ordered = np.ascontiguousarray(codes.transpose(0, 2, 1)).astype(np.uint8)
        packed.reshape(stored)[start:stop] = pack_bits(ordered, 4).reshape(stop - start, *stored[1:])


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise byte tensors `X_blocks` that have `X_scales` with one axis less: the weight is `X`."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_blocks") or tensor.dtype != "U8":
            continue
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if scales is None or scales.dtype not in ("U8", "F8_E8M0") or scales.shape != tensor.shape[:-1]:
            continue
        parts = collect(tensors, {"blocks": name, "scales": f"{stem}_scales"})
        if len(tensor.shape) != 4 or tensor.shape[-1] != _BLOCK // 2:
            stored = tuple(part.name for part in parts)
            recognised[stem] = Unreadable("mxfp4", stored, f"blocks of shape {shape_text(tensor.shape)}")
            continue
        experts, rows, groups, _ = tensor.shape
        recognised[stem] = PackedWeight("mxfp4", (experts, groups * _BLOCK, rows), "BF16", parts, ExpertBlocks())
    return recognised
