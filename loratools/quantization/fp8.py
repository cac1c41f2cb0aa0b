"""Float8 weights, with or without a scale beside them.

    weight F8 (out, in)   weight_scale_inv (out / 128, in / 128)   DeepSeek, Qwen: one scale per block
                          weight_scale () or (out, 1)              per tensor or per row: compressed-tensors, ModelOpt
                          weight_scale U8 (out, in / 32)           MXFP8: powers of two
                          scale_weight (), and a marker scaled_fp8 ComfyUI

    W = float(weight) * scale: every one of them multiplies, "inv" or not.

Without a scale the numbers are the weights, but merging into them is useless: a delta rounded to three bits of mantissa
is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from loratools.quantization.common.config import find_setting, model_dtype
from loratools.quantization.common.eight_bits import eight_bit_format
from loratools.quantization.common.parts import read_floats
from loratools.quantization.common.protocol import PackedWeight, Part, Recognised, Unreadable
from loratools.tensors.dtypes import FLOAT8_DTYPES, FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

# Stored tensors that mark a whole file as having this scheme, and belong to no weight.
MARKERS = ("scaled_fp8",)
# Float8 tensors that belong to weights of other schemes: scales of NVFP4, the values of quanto and torchao.
_NOT_WEIGHTS = ("scale", "scales", "scale_inv", "scale_2", "absmax", "._data", "_qdata", "scaled_fp8")
# Other tensors that may accompany a weight: scales of activations, and ComfyUI's description.
_COMPANIONS = ("input_scale", "activation_scale", "scale_input", "comfy_quant")
_SCALE_DTYPES = frozenset({*FLOAT_DTYPES, "F8_E8M0", "U8"})
_USUAL_BLOCK = 128


@dataclass(frozen=True)
class Float8:
    """Float8 numbers, and a scale for each block of (rows, columns); without blocks, one scale for all, or none.

    dtype   of the numbers
    block   rows and columns of the last two axes that share a scale; one of a whole axis is as long as the axis
    scaled  whether there is a scale at all
    """

    dtype: str
    block: tuple[int, int] | None
    scaled: bool = True
    bits: int = 8

    @property
    def format(self) -> str:
        """The number format in words, such as `fp8 e4m3`, and which values share a scale."""
        name = eight_bit_format(self.dtype)
        if not self.scaled:
            return f"{name}, no scale"
        return f"{name}, one scale" if self.block is None else f"{name}, a scale for {self.block[0]} x {self.block[1]}"

    @property
    def group(self) -> int | None:
        return self.block[1] if self.block is not None else None

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product in float32, rounded once to the weight's dtype."""
        import numpy as np

        from loratools.algebra.packing import onto_grid

        values = read_floats(weight.tensor("weight"), start, stop)
        if not self.scaled:
            return values
        values *= self._scales_of_rows(weight, start, stop, values.shape)
        return onto_grid(np.ascontiguousarray(values), weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import float8_values
        from loratools.storage.arrays import read_raw

        codes = read_raw(weight.tensor("weight"), start, stop)
        values = float8_values(self.dtype)
        scales = self._scales_of_rows(weight, start, stop, codes.shape)
        return LevelGrid(values, np.flatnonzero(np.isfinite(values)), codes, scales, weight.dtype)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        packed.reshape(weight.shape)[start:stop] = codes

    def _scales_of_rows(self, weight: PackedWeight, start: int, stop: int, shape: tuple[int, ...]) -> Floats:
        """The factors of rows start:stop: numbers that broadcast to their shape."""
        import numpy as np

        if not self.scaled:
            return np.ones((), np.float32)
        scale = weight.tensor("scale")
        if self.block is None:
            return _scale_values(scale, 0, None).reshape(-1)[:1]
        if len(shape) > 2:
            scales = _scale_values(scale, *((start, stop) if scale.shape[0] == weight.shape[0] else (0, None)))
            return _repeated(scales, self.block, shape[-2:], 0)
        first, last = start // self.block[0], -(-stop // self.block[0])
        scales = _scale_values(scale, first, last).reshape(last - first, -1)
        return _repeated(scales, self.block, shape, start - first * self.block[0])


def _scale_values(scale: LazyTensor, start: int, stop: int | None) -> Floats:
    """Rows of the scales as float32; bytes are exponents."""
    from loratools.algebra.packing import e8m0
    from loratools.storage.arrays import read_raw

    if scale.dtype == "U8":
        return e8m0(read_raw(scale, start, stop))
    return read_floats(scale, start, stop)


def _repeated(scales: Floats, block: tuple[int, int], shape: tuple[int, ...], skipped: int) -> Floats:
    """Expand the scales of blocks to one for each value of the last two axes, without the `skipped` first rows of the
    first block.
    """
    import numpy as np

    rows = np.repeat(scales, block[0], axis=-2) if block[0] > 1 else scales
    rows = rows[..., skipped : skipped + shape[-2], :]
    if rows.shape[-1] == 1:
        return rows
    return np.repeat(rows, block[1], axis=-1)[..., : shape[-1]]


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise float8 tensors that are not scales, each with the scale that is named after it.

    The config gives the size of blocks if the shapes of the scales are ambiguous, and the dtype that the model computes
    in.
    """
    computed_in, block = model_dtype(config), _declared_block(config)
    return {
        name: _recognised(name, tensor, tensors, computed_in, block)
        for name, tensor in tensors.items()
        if tensor.dtype in FLOAT8_DTYPES and not name.endswith(_NOT_WEIGHTS)
    }


def _recognised(
    name: str,
    tensor: LazyTensor,
    tensors: Mapping[str, LazyTensor],
    computed_in: str | None,
    declared: tuple[int, int] | None,
) -> PackedWeight | Unreadable:
    module = name.removesuffix(".weight")
    names = {"weight": name}
    for candidate in (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale_weight", f"{module}.scale"):
        if candidate in tensors:
            names["scale"] = candidate
            break
    names |= {leaf: f"{module}.{leaf}" for leaf in _COMPANIONS if f"{module}.{leaf}" in tensors}
    parts = tuple(Part(role, stored, tensors[stored]) for role, stored in names.items())
    if "scale" not in names:
        # bfloat16 represents every number of e4m3, e5m2 and their variants, and is the usual compute dtype.
        return PackedWeight("fp8", tensor.shape, "BF16", parts, _parameters(tensor.dtype, None, False))
    scale = tensors[names["scale"]]
    stored = tuple(names.values())
    dtype = scale.dtype if scale.dtype in ("F16", "BF16") else computed_in or "F32"
    if dtype == "F64" or scale.dtype not in _SCALE_DTYPES:
        return Unreadable("fp8", stored, f"its scale has dtype {scale.dtype}")
    block = _block(tensor.shape, scale.shape, declared)
    if block is None and scale.elements != 1:
        return Unreadable(
            "fp8", stored, f"a scale of shape {shape_text(scale.shape)} for a weight of {shape_text(tensor.shape)}"
        )
    return PackedWeight("fp8", tensor.shape, dtype, parts, _parameters(tensor.dtype, block, True))


@cache
def _parameters(dtype: str, block: tuple[int, int] | None, scaled: bool) -> Float8:
    """One shared object for all equal weights: a model may have 45,000 of them."""
    return Float8(dtype, block, scaled)


def _declared_block(config: Mapping[str, object]) -> tuple[int, int] | None:
    """Rows and columns of a block, if the config states them."""
    sizes = find_setting(config, "weight_block_size", "block_structure")
    if isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes):
        return sizes[0], sizes[1]
    return None


@cache
def _block(shape: tuple[int, ...], grid: tuple[int, ...], declared: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by the shapes of weight and scale; None if one scale is for all, or if the
    shapes are ambiguous and the config does not help.
    """
    if len(shape) < 2 or math.prod(grid) == 1:
        return None
    grid = grid if len(grid) > 1 else (*grid, 1)
    if len(grid) != len(shape) or any(n not in (1, m) for n, m in zip(grid[:-2], shape[:-2], strict=True)):
        return None
    rows = _length(shape[-2], grid[-2], declared[0] if declared is not None else None)
    columns = _length(shape[-1], grid[-1], declared[1] if declared is not None else None)
    return (rows, columns) if rows is not None and columns is not None else None


def _length(size: int, blocks: int, declared: int | None) -> int | None:
    """The length of the blocks along an axis, given how many there are."""
    if blocks == 1:
        return size
    if blocks == size:
        return 1
    for length in (declared, _USUAL_BLOCK):
        if length and -(-size // length) == blocks:
            return length
    # Without the config, only an even division into powers of two is certain.
    length = size // blocks
    return length if size % blocks == 0 and length & (length - 1) == 0 else None
