"""MLX: integers of 2 to 8 bits packed in words, with a scale and an offset for each group.

    affine   weight U32 (out, in * bits / 32)   scales (out, in / group)   biases (out, in / group), or qbiases
    mxfp4    weight U32 (out, in / 8)           scales U8 (out, in / 32)
    nvfp4    weight U32 (out, in / 8)           scales U8 (out, in / 16)
    mxfp8    weight U32 (out, in / 4)           scales U8 (out, in / 32)

    W = code * scale + bias      affine: rounded to the dtype of the scales after the product and after the sum
    W = E2M1[code] * scale       mxfp4 (a power of two) and nvfp4 (a float8), in bfloat16
    W = E4M3[code] * scale       mxfp8 (a power of two), in bfloat16

Codes are a little-endian stream along a row. Experts are stacked in front: (experts, out, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.config import settings
from loratools.quantization.common.parts import collect, read_floats
from loratools.quantization.common.protocol import PackedWeight, Part, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

_WIDTHS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
# Bits of a code and values of a group, for each floating-point mode.
_FLOAT_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


@dataclass(frozen=True)
class AffineGroups:
    """Unsigned integers, with a scale and an offset for each group of a row."""

    bits: int
    group: int
    format: str = "affine"

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32, rounded as in MLX: after the product, and after the sum."""
        import numpy as np

        from loratools.algebra.packing import onto_grid, unpack_bits
        from loratools.storage.arrays import read_raw

        packed = read_raw(weight.tensor("weight"), start, stop)
        codes = unpack_bits(packed.view(np.uint8), self.bits).astype(np.float32)
        groups = codes.reshape(*codes.shape[:-1], -1, self.group)
        products = onto_grid(groups * read_floats(weight.tensor("scales"), start, stop)[..., None], weight.dtype)
        values = products + read_floats(weight.tensor("biases"), start, stop)[..., None]
        return onto_grid(values.reshape(stop - start, *weight.shape[1:]), weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import unpack_bits
        from loratools.storage.arrays import read_raw

        words = read_raw(weight.tensor("weight"), start, stop)
        codes = unpack_bits(words.view(np.uint8), self.bits)
        scales, biases = (
            np.repeat(read_floats(weight.tensor(role), start, stop), self.group, axis=-1)
            for role in ("scales", "biases")
        )
        levels = np.arange(1 << self.bits)
        return LevelGrid(levels.astype(np.float32), levels, codes, scales, weight.dtype, offset=biases)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        _pack_rows(weight, codes, self.bits, start, stop, packed)


@dataclass(frozen=True)
class FloatGroups:
    """Floats of 4 or 8 bits, with a one-byte scale for each group of a row; mode: mxfp4, nvfp4 or mxfp8."""

    format: str

    @property
    def bits(self) -> float:
        return _FLOAT_MODES[self.format][0]

    @property
    def group(self) -> int | None:
        return _FLOAT_MODES[self.format][1]

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32, rounded once to the weight's dtype."""
        import numpy as np

        from loratools.algebra.packing import decode_pairs, e2m1_pairs, e8m0, float8_values, onto_grid
        from loratools.storage.arrays import read_raw

        codes = read_raw(weight.tensor("weight"), start, stop).view(np.uint8)
        values = float8_values("F8_E4M3")[codes] if self.format == "mxfp8" else decode_pairs(codes, e2m1_pairs())
        stored = read_raw(weight.tensor("scales"), start, stop)
        scales = float8_values("F8_E4M3")[stored] if self.format == "nvfp4" else e8m0(stored)
        groups = values.reshape(*stored.shape, _FLOAT_MODES[self.format][1]) * scales[..., None]
        return onto_grid(groups.reshape(stop - start, *weight.shape[1:]), weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import E2M1, e8m0, float8_values, unpack_bits
        from loratools.storage.arrays import read_raw

        width, group = _FLOAT_MODES[self.format]
        codes = unpack_bits(read_raw(weight.tensor("weight"), start, stop).view(np.uint8), width)
        values = float8_values("F8_E4M3") if self.format == "mxfp8" else np.array(E2M1, np.float32)
        stored = read_raw(weight.tensor("scales"), start, stop)
        scales = float8_values("F8_E4M3")[stored] if self.format == "nvfp4" else e8m0(stored)
        allowed = np.flatnonzero(np.isfinite(values))
        return LevelGrid(values, allowed, codes, np.repeat(scales, group, axis=-1), weight.dtype)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        _pack_rows(weight, codes, _FLOAT_MODES[self.format][0], start, stop, packed)


def _pack_rows(weight: PackedWeight, codes: Integers, width: int, start: int, stop: int, packed: Bytes) -> None:
    import numpy as np

    from loratools.algebra.packing import pack_bits

    *lead, words = weight.tensor("weight").shape
    packed.reshape(*lead, 4 * words)[start:stop] = pack_bits(codes.astype(np.uint8), width)


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise weights in unsigned 32-bit words, with `scales` beside them.

    The config states bits and group size, for all modules or for one by its name. Without it, the shapes decide if only
    one combination is possible.
    """
    return {
        name: _recognised(name, tensors, config)
        for name, tensor in tensors.items()
        if tensor.dtype == "U32" and name.endswith("weight") and name.removesuffix("weight") + "scales" in tensors
    }


def _recognised(
    name: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, object]
) -> PackedWeight | Unreadable:
    stem = name.removesuffix("weight")
    biases = next((b for b in (f"{stem}biases", f"{stem}qbiases") if b in tensors), f"{stem}biases")
    parts = collect(tensors, {"weight": name, "scales": f"{stem}scales", "biases": biases})
    weight, scales = parts[0].tensor, parts[1].tensor
    stored = tuple(part.name for part in parts)
    if len(weight.shape) < 2 or scales.shape[:-1] != weight.shape[:-1] or not scales.shape[-1]:
        return Unreadable("mlx", stored, f"scales of {shape_text(scales.shape)} for {shape_text(weight.shape)} words")
    quantization_settings = settings(config)
    of_module = quantization_settings.get(stem.removesuffix("."))
    quantization_settings = of_module if isinstance(of_module, Mapping) else quantization_settings
    # Bits of a whole group: the shapes determine nothing more.
    group_bits = weight.shape[-1] * 32 // scales.shape[-1]
    if len(parts) == 2 and scales.dtype == "U8":
        modes = [mode for mode, (width, group) in _FLOAT_MODES.items() if width * group == group_bits]
        if len(modes) != 1:
            return Unreadable("mlx", stored, f"groups of {group_bits} bits, which no floating-point mode has")
        columns = scales.shape[-1] * _FLOAT_MODES[modes[0]][1]
        return PackedWeight("mlx", (*weight.shape[:-1], columns), "BF16", parts, FloatGroups(modes[0]))
    return _affine(parts, group_bits, quantization_settings)


def _affine(
    parts: tuple[Part, ...], group_bits: int, quantization_settings: Mapping[str, object]
) -> PackedWeight | Unreadable:
    weight, scales = parts[0].tensor, parts[1].tensor
    stored = tuple(part.name for part in parts)
    if len(parts) != 3 or parts[2].tensor.shape != scales.shape or parts[2].tensor.dtype != scales.dtype:
        return Unreadable("mlx", stored, "it has no biases of the shape and dtype of its scales")
    if scales.dtype not in ("F32", "F16", "BF16"):
        return Unreadable("mlx", stored, f"scales of dtype {scales.dtype}")
    possible = [(width, group) for width in _WIDTHS for group in _GROUPS if width * group == group_bits]
    declared = (quantization_settings.get("bits"), quantization_settings.get("group_size"))
    if declared in possible:
        possible = [pair for pair in possible if pair == declared]
    if len(possible) != 1:
        why = (
            " or ".join(f"{width} bits in groups of {group}" for width, group in possible) or "nothing that MLX writes"
        )
        return Unreadable("mlx", stored, f"its shapes fit {why}, and the config does not say which")
    width, group = possible[0]
    shape = (*weight.shape[:-1], scales.shape[-1] * group)
    return PackedWeight("mlx", shape, scales.dtype, parts, AffineGroups(width, group))
