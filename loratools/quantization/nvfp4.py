"""NVFP4: 4-bit floats in blocks of 16 with a float8 scale each, and one scale for the whole tensor.

    ModelOpt             weight U8 (out, in / 2)          weight_scale F8_E4M3 (out, in / 16)   weight_scale_2 ()
    compressed-tensors   weight_packed U8 (out, in / 2)   weight_scale F8_E4M3 (out, in / 16)   weight_global_scale (1)

The lower half of a byte comes first. ModelOpt's scale of the whole tensor multiplies, that of compressed-tensors
divides:

    W = E2M1[code] * (weight_scale * weight_scale_2)          in float32, rounded once to the model's dtype
    W = E2M1[code] * (weight_scale / weight_global_scale)     in float32, rounded once to bfloat16
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.config import model_dtype
from loratools.quantization.common.parts import collect, read_floats
from loratools.quantization.common.protocol import PackedWeight, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

# Fused experts are parameters of their own (`experts.gate_up_proj`), with `_weight_scale_2` behind their name.
_SECOND_SCALES = ("_scale_2", "_weight_scale_2", "_global_scale")
_BLOCK = 16


@dataclass(frozen=True)
class TwoLevelFloats:
    """Floats of 4 bits with a float8 scale for each 16, and one scale for the tensor that multiplies or divides."""

    divides: bool
    format: str = "nvfp4"
    bits: int = 4
    group: int = _BLOCK

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: all products in float32, rounded once to the weight's dtype."""
        from loratools.algebra.packing import decode_pairs, e2m1_pairs, onto_grid
        from loratools.storage.arrays import read_raw

        values = decode_pairs(read_raw(weight.tensor("packed"), start, stop), e2m1_pairs())
        scales = self._scales(weight, start, stop)
        blocks = values.reshape(stop - start, -1, _BLOCK) * scales[..., None]
        return onto_grid(blocks.reshape(stop - start, weight.shape[1]), weight.dtype)

    def _scales(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        scales = read_floats(weight.tensor("scale"), start, stop)
        overall = read_floats(weight.tensor("overall scale")).reshape(-1)[0]
        combined: Floats = scales / overall if self.divides else scales * overall
        return combined

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import E2M1, unpack_bits
        from loratools.storage.arrays import read_raw

        codes = unpack_bits(read_raw(weight.tensor("packed"), start, stop), 4)
        scales = np.repeat(self._scales(weight, start, stop), _BLOCK, axis=-1)
        return LevelGrid(np.array(E2M1, np.float32), np.arange(16), codes, scales, weight.dtype)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.packing import pack_bits

        packed.reshape(weight.shape[0], weight.shape[1] // 2)[start:stop] = pack_bits(codes.astype(np.uint8), 4)


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise byte tensors with a second scale, that of the whole tensor, beside them."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("_packed")
        if tensor.dtype in ("U8", "F4") and any(stem + scale in tensors for scale in _SECOND_SCALES):
            recognised[stem] = _recognised(name, stem, tensors, config)
    return recognised


def _recognised(
    name: str, stem: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, object]
) -> PackedWeight | Unreadable:
    second = next(stem + scale for scale in _SECOND_SCALES if stem + scale in tensors)
    first = next((s for s in (f"{stem}_scale", f"{stem}_weight_scale") if s in tensors), f"{stem}_scale")
    module = stem.removesuffix(".weight")
    inputs = {part: f"{module}.{part.replace(' ', '_')}" for part in ("input scale", "input global scale")}
    inputs |= {"experts' input scale": f"{stem}_input_scale"}
    parts = collect(tensors, {"packed": name, "scale": first, "overall scale": second, **inputs})
    stored = tuple(part.name for part in parts)
    packed, scale, overall = tensors[name], tensors.get(first), tensors[second]
    if not stem.endswith("weight") or len(packed.shape) != 2:
        return Unreadable("nvfp4", stored, "fused experts in NVFP4 are not read: no package shows how they are packed")
    if packed.dtype != "U8" or scale is None or scale.dtype != "F8_E4M3":
        return Unreadable("nvfp4", stored, f"values of {packed.dtype} with scales of {scale and scale.dtype}")
    columns = 2 * packed.shape[1]
    if scale.shape != (packed.shape[0], columns // _BLOCK) or overall.elements != 1 or overall.dtype != "F32":
        why = (
            f"scales of {shape_text(scale.shape)} and {shape_text(overall.shape)} for {shape_text(packed.shape)} bytes"
        )
        return Unreadable("nvfp4", stored, why)
    divides = second.endswith("_global_scale")
    dtype = "BF16" if divides else model_dtype(config) or "BF16"
    return PackedWeight("nvfp4", (packed.shape[0], columns), dtype, parts, TwoLevelFloats(divides))
