"""GPTQ: integers packed along the inputs.

    qweight I32 (in * bits / 32, out)   qzeros I32 (groups, out * bits / 32)   scales (groups, out)   g_idx I32 (in)

    W[o, i] = (code[i, o] - zero[g, o]) * scales[g, o],   g = g_idx[i], or i // group_size

Codes are a little-endian stream down a column, zero points along a row. The first format of AutoGPTQ stores each zero
point minus one, modulo 2 ** bits; with `gptq_v2` in the config's checkpoint_format it is stored as it is.

AWQ has the same keys; it packs along the outputs, and has no g_idx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.config import find_setting
from loratools.quantization.common.grouped import over_groups, scaled
from loratools.quantization.common.packed import packs_outputs, quantised_modules, scales_of_rows
from loratools.quantization.common.parts import collect, read_columns
from loratools.quantization.common.protocol import PackedWeight, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

# How many values are unpacked together: the packed numbers of some rows are spread over the stored tensor.
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True)
class GptqIntegers:
    """Unsigned integers with a scale and a zero point for each group of inputs.

    bits            bits of one code group           inputs that share a scale, in whatever order they were taken; None
    if all do zeros_less_one  whether zero points are stored less one (the first format)
    """

    bits: int
    group: int | None
    zeros_stored_less_one: bool

    @property
    def format(self) -> str:
        """The number format in words, such as `int4`, and the version of the zero points."""
        return f"int{self.bits}{'' if self.zeros_stored_less_one else ', zero points of v2'}"

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product, rounded once to the dtype of the scales."""
        from loratools.storage.arrays import read_raw

        order = read_raw(weight.tensor("g_idx")).reshape(-1) if weight.has("g_idx") else None
        scales, zeros = self._groups(weight, start, stop)
        return scaled(self._codes(weight, start, stop), scales, zeros, weight.dtype, order)

    def _codes(self, weight: PackedWeight, start: int, stop: int) -> Bytes:
        import numpy as np

        from loratools.algebra.packing import unpack_bits

        words = np.ascontiguousarray(read_columns(weight.tensor("qweight"), start, stop).T)
        return unpack_bits(words.view(np.uint8), self.bits)[:, : weight.shape[1]]

    def _groups(self, weight: PackedWeight, start: int, stop: int) -> tuple[Floats, Floats]:
        """Scales and zero points of rows start:stop, (rows, groups), in float32."""
        import numpy as np

        from loratools.algebra.packing import unpack_bits

        first, last = start * self.bits // 32, -(-stop * self.bits // 32)
        packed = np.ascontiguousarray(read_columns(weight.tensor("qzeros"), first, last))
        zeros = unpack_bits(packed.view(np.uint8), self.bits)[:, : stop - start]
        if self.zeros_stored_less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        return scales_of_rows(weight, start, stop), zeros.T.astype(np.float32)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.storage.arrays import read_raw

        order = read_raw(weight.tensor("g_idx")).reshape(-1) if weight.has("g_idx") else None
        scales, zeros = (over_groups(n, weight.shape[1], order) for n in self._groups(weight, start, stop))
        levels = np.arange(1 << self.bits)
        codes = self._codes(weight, start, stop)
        return LevelGrid(levels.astype(np.float32), levels, codes, scales, weight.dtype, zero=zeros)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.packing import pack_bits

        words = pack_bits(codes.astype(np.uint8), self.bits).view("<i4")
        packed.view("<i4").reshape(weight.tensor("qweight").shape)[:, start:stop] = words.T


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise `qweight` tensors that have a g_idx, or as many columns as their scales.

    The config states the format of the zero points; by default it is the first one.
    """
    zeros_stored_less_one = find_setting(config, "checkpoint_format") != "gptq_v2"
    modules = [module for module in quantised_modules(tensors) if not packs_outputs(module, tensors)]
    return {f"{module}.weight": _recognised(module, tensors, zeros_stored_less_one) for module in modules}


def _recognised(
    module: str, tensors: Mapping[str, LazyTensor], zeros_stored_less_one: bool
) -> PackedWeight | Unreadable:
    parts = collect(tensors, {role: f"{module}.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")})
    by_role = {part.role: part.tensor for part in parts}
    stored = tuple(part.name for part in parts)
    codes, zeros, scales, order = (by_role.get(role) for role in ("qweight", "qzeros", "scales", "g_idx"))
    assert codes is not None, "checked by `quantised_modules`"
    if zeros is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2 or len(zeros.shape) != 2:
        return Unreadable("gptq", stored, "it has no zero points or scales of two axes")
    outputs, groups = codes.shape[1], scales.shape[0]
    width = zeros.shape[1] * 32 // outputs if outputs else 0
    inputs = codes.shape[0] * 32 // width if width else 0
    consistent = (
        width in (2, 3, 4, 8)
        and codes.dtype == zeros.dtype == "I32"
        and -(-outputs * width // 32) == zeros.shape[1]
        and codes.shape[0] * 32 == inputs * width
        and scales.shape == (groups, outputs)
        and zeros.shape[0] == groups
        and scales.dtype in ("F32", "F16", "BF16")
        and (order is None or (order.elements == inputs and order.dtype == "I32"))
        and groups > 0
    )
    if not consistent:
        shapes = ", ".join(f"{part.role} {shape_text(part.tensor.shape)}" for part in parts)
        return Unreadable("gptq", stored, f"its parts do not fit each other: {shapes}")
    group = -(-inputs // groups) if groups > 1 else None
    parameters = GptqIntegers(width, group, zeros_stored_less_one)
    # 32 codes of any width are whole words.
    row_block = max(32, _BLOCK_VALUES // max(1, inputs) // 32 * 32)
    return PackedWeight("gptq", (outputs, inputs), scales.dtype, parts, parameters, row_block)
