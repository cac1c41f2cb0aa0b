"""compressed-tensors (llm-compressor): integers packed in words, int8 with scales, MXFP4 and sparse bitmasks.

    packed   weight_packed I32 (out, in * bits / 32), weight_scale (out, groups), weight_shape (2)
             weight_zero_point I32 (out * bits / 32, groups), weight_g_idx (in)
    mxfp4    weight_packed U8 (out, in / 2), weight_scale U8 (out, in / 32)
    int8     weight I8 (out, in), weight_scale (out, groups), (out, 1) or (1), weight_zero_point I8 of the same shape
    sparse   compressed, bitmask, shape, row_offsets

    W = (code - 2 ** (bits - 1) - zero) * scale      packed, in the dtype of the scale
    W = E2M1[code] * 2 ** (scale - 127)              mxfp4, in bfloat16

Codes are a little-endian stream along a row. Its float8 weights are recognised by `fp8` and its NVFP4 weights by
`nvfp4`, since they are the same as those of other programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.grouped import over_groups, scaled
from loratools.quantization.common.parts import collect, read_floats, read_groups, read_numbers
from loratools.quantization.common.protocol import PackedWeight, Part, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

_SCHEME = "compressed-tensors"
_MX_BLOCK = 32


@dataclass(frozen=True)
class PackedIntegers:
    """Signed integers of 1 to 8 bits, packed along the rows.

    bits       bits of one code group      columns that share a scale; None if a row does symmetric  whether zero is
    always code 0
    """

    bits: int
    group: int | None
    symmetric: bool

    @property
    def format(self) -> str:
        """The number format in words, such as `int4 symmetric` or `int8 asymmetric`."""
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'}"

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product, rounded once to the dtype of the scale."""
        import numpy as np

        codes = self._codes(weight, start, stop).astype(np.int16) - (1 << (self.bits - 1))
        scales, zeros = self._groups(weight, start, stop)
        return scaled(codes, scales, zeros, weight.dtype, _order(weight))

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid

        order, columns = _order(weight), weight.shape[1]
        scales, zeros = self._groups(weight, start, stop)
        codes = np.arange(1 << self.bits)
        return LevelGrid(
            codes.astype(np.float32) - (1 << (self.bits - 1)),
            codes,
            self._codes(weight, start, stop),
            over_groups(scales, columns, order),
            weight.dtype,
            zero=over_groups(zeros, columns, order) if zeros is not None else None,
        )

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.packing import pack_bits

        rows, words = weight.tensor("packed").shape
        stream = pack_bits(codes.astype(np.uint8), self.bits)
        packed.reshape(rows, 4 * words)[start:stop, : stream.shape[1]] = stream

    def _codes(self, weight: PackedWeight, start: int, stop: int) -> Bytes:
        import numpy as np

        from loratools.algebra.packing import unpack_bits
        from loratools.storage.arrays import read_raw

        words = read_raw(weight.tensor("packed"), start, stop)
        return unpack_bits(words.view(np.uint8), self.bits)[:, : weight.shape[1]]

    def _groups(self, weight: PackedWeight, start: int, stop: int) -> tuple[Floats, Floats | None]:
        """Scales and zero points of rows start:stop, (rows, groups), in float32."""
        import numpy as np

        from loratools.algebra.packing import unpack_bits
        from loratools.storage.arrays import read_raw

        scales = read_floats(weight.tensor("scale"), start, stop)
        if not weight.has("zero point"):
            return scales, None
        stored = weight.tensor("zero point")
        first, last = start * self.bits // 32, -(-stop * self.bits // 32)
        columns = np.ascontiguousarray(read_raw(stored, first, min(last, stored.shape[0])).T)
        zeros = unpack_bits(columns.view(np.uint8), self.bits)[:, : stop - start].T.astype(np.float32)
        return scales, zeros - (1 << (self.bits - 1))


def _order(weight: PackedWeight) -> Integers | None:
    """The group of each column, if columns were quantised in another order."""
    from loratools.storage.arrays import read_raw

    return read_raw(weight.tensor("g_idx")).reshape(-1) if weight.has("g_idx") else None


@dataclass(frozen=True)
class PlainIntegers:
    """Integers of 8 bits, with a scale for the tensor, for each row, or for groups of a row."""

    group: int | None
    symmetric: bool
    bits: int = 8

    @property
    def format(self) -> str:
        return f"int8 {'symmetric' if self.symmetric else 'asymmetric'}"

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product, rounded once to the dtype of the scale."""
        from loratools.storage.arrays import read_raw

        codes = read_raw(weight.tensor("weight"), start, stop)
        scales = read_groups(weight.tensor("scale"), start, stop)
        zeros = read_groups(weight.tensor("zero point"), start, stop) if weight.has("zero point") else None
        return scaled(codes, scales, zeros, weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import signed_bytes
        from loratools.storage.arrays import read_raw

        columns = weight.shape[1]
        zeros = read_groups(weight.tensor("zero point"), start, stop) if weight.has("zero point") else None
        return LevelGrid(
            signed_bytes(),
            np.arange(256),
            read_raw(weight.tensor("weight"), start, stop).view(np.uint8),
            over_groups(read_groups(weight.tensor("scale"), start, stop), columns),
            weight.dtype,
            zero=over_groups(zeros, columns) if zeros is not None else None,
        )

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        packed.reshape(weight.shape)[start:stop] = codes


@dataclass(frozen=True)
class MicroscaledFloats:
    """Floats of 4 bits in blocks of 32, each with a power of two, along the rows of a linear layer."""

    format: str = "mxfp4"
    bits: int = 4
    group: int = _MX_BLOCK

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32; exact in bfloat16, except for powers below its range."""
        from loratools.algebra.packing import decode_pairs, e2m1_pairs, e8m0, onto_grid
        from loratools.storage.arrays import read_raw

        values = decode_pairs(read_raw(weight.tensor("packed"), start, stop), e2m1_pairs())
        scales = e8m0(read_raw(weight.tensor("scale"), start, stop))
        blocks = values.reshape(stop - start, -1, _MX_BLOCK) * scales[..., None]
        return onto_grid(blocks.reshape(stop - start, weight.shape[1]), weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import E2M1, e8m0, unpack_bits
        from loratools.storage.arrays import read_raw

        codes = unpack_bits(read_raw(weight.tensor("packed"), start, stop), 4)
        scales = np.repeat(e8m0(read_raw(weight.tensor("scale"), start, stop)), _MX_BLOCK, axis=-1)
        return LevelGrid(np.array(E2M1, np.float32), np.arange(16), codes, scales, weight.dtype)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.packing import pack_bits

        packed.reshape(weight.tensor("packed").shape)[start:stop] = pack_bits(codes.astype(np.uint8), 4)


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise packed, int8 and bitmask-compressed weights."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        module, dot, leaf = name.rpartition(".")
        stem = module + dot
        has_scale = f"{stem}weight_scale" in tensors
        if leaf == "weight_packed" and has_scale and tensor.dtype == "I32":
            recognised[f"{stem}weight"] = _packed(stem, tensors)
        elif leaf == "weight_packed" and has_scale and tensor.dtype == "U8":
            if f"{stem}weight_global_scale" not in tensors:
                recognised[f"{stem}weight"] = _microscaled(stem, tensors)
        # ComfyUI's int8 has the same scale, and is marked by a JSON tensor.
        elif leaf == "weight" and has_scale and tensor.dtype == "I8" and f"{stem}comfy_quant" not in tensors:
            recognised[name] = _plain(stem, tensors)
        elif leaf == "compressed" and f"{stem}bitmask" in tensors:
            roles = ("compressed", "bitmask", "shape", "row_offsets")
            stored = tuple(f"{stem}{role}" for role in roles if f"{stem}{role}" in tensors)
            recognised[f"{stem}weight"] = Unreadable(_SCHEME, stored, "sparse weights are not unpacked")
    return recognised


def _parts(stem: str, tensors: Mapping[str, LazyTensor], first: str) -> tuple[Part, ...]:
    names = {first.removeprefix("weight_"): f"{stem}{first}"}
    names |= {"scale": f"{stem}weight_scale", "zero point": f"{stem}weight_zero_point", "g_idx": f"{stem}weight_g_idx"}
    names |= {"shape": f"{stem}weight_shape"}
    names |= {part: stem + part.replace(" ", "_") for part in ("input scale", "input global scale", "input zero point")}
    return collect(tensors, names)


def _packed(stem: str, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    parts = _parts(stem, tensors, "weight_packed")
    by_role = {part.role: part.tensor for part in parts}
    stored = tuple(part.name for part in parts)
    packed, scale = by_role["packed"], by_role["scale"]
    try:
        shape = read_numbers(by_role["shape"])
    except (KeyError, ValueError):
        return Unreadable(_SCHEME, stored, "it has no readable weight_shape")
    if len(shape) != 2 or len(packed.shape) != 2 or shape[0] != packed.shape[0] or shape[1] < 1:
        return Unreadable(_SCHEME, stored, f"a shape of {list(shape)} for {shape_text(packed.shape)} words")
    widths = [bits for bits in range(1, 9) if -(-shape[1] * bits // 32) == packed.shape[1]]
    if len(widths) != 1:
        return Unreadable(
            _SCHEME, stored, f"{packed.shape[1]} words for {shape[1]} values, of no unique number of bits"
        )
    if len(scale.shape) != 2 or scale.shape[0] != shape[0] or scale.dtype not in ("F32", "F16", "BF16"):
        return Unreadable(_SCHEME, stored, f"a scale of {scale.dtype} and shape {shape_text(scale.shape)}")
    zero = by_role.get("zero point")
    if zero is not None and (zero.dtype != "I32" or zero.shape != (-(-shape[0] * widths[0] // 32), scale.shape[1])):
        return Unreadable(_SCHEME, stored, f"zero points of {zero.dtype} and shape {shape_text(zero.shape)}")
    groups = scale.shape[1]
    columns = -(-shape[1] // groups) if groups > 1 else None
    parameters = PackedIntegers(widths[0], columns, zero is None)
    # Zero points are packed along the rows, in whole words.
    row_block = 1 if zero is None else 32
    return PackedWeight(_SCHEME, (shape[0], shape[1]), scale.dtype, parts, parameters, row_block)


def _plain(stem: str, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    parts = _parts(stem, tensors, "weight")
    by_role = {part.role: part.tensor for part in parts}
    weight, scale, zero = by_role["weight"], by_role["scale"], by_role.get("zero point")
    rows = weight.shape[0] if weight.shape else 0
    fits = scale.elements == 1 or (scale.shape[:1] == (rows,) and len(scale.shape) <= 2)
    if len(weight.shape) != 2 or not fits or scale.dtype not in ("F32", "F16", "BF16"):
        why = f"a scale of {scale.dtype} and shape {shape_text(scale.shape)} for a weight of {shape_text(weight.shape)}"
        return Unreadable(_SCHEME, tuple(part.name for part in parts), why)
    groups = scale.elements // rows if scale.elements > 1 else 1
    columns = -(-weight.shape[1] // groups) if groups > 1 else None
    return PackedWeight(_SCHEME, weight.shape, scale.dtype, parts, PlainIntegers(columns, zero is None))


def _microscaled(stem: str, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    parts = _parts(stem, tensors, "weight_packed")
    packed, scale = parts[0].tensor, parts[1].tensor
    columns = 2 * packed.shape[-1]
    if (
        len(packed.shape) != 2
        or scale.dtype not in ("U8", "F8_E8M0")
        or scale.shape
        != (
            packed.shape[0],
            columns // _MX_BLOCK,
        )
    ):
        why = f"a scale of {scale.dtype} and shape {shape_text(scale.shape)} for {shape_text(packed.shape)} bytes"
        return Unreadable(_SCHEME, tuple(part.name for part in parts), why)
    return PackedWeight(_SCHEME, (packed.shape[0], columns), "BF16", parts, MicroscaledFloats())
