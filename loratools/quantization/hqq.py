"""HQQ: integers of 1 to 8 bits, with a scale and a zero point for each group.

    W_q U8 | I32 (or the same bits called float)   scale   zero   and nbits, group_size, shape, axis, packing as tensors

    W = (code - zero) * scale, reshaped to shape      rounded to the dtype of the scale after each of the two

The weight is first cut into groups: with axis 1 a group is a row of (groups, group_size), with axis 0 a column of
(group_size, groups). Codes are packed along the first axis of that. With 4 bits, the first half of the rows is in the
upper bits of the bytes, the second in the lower.

SINQ stores its `W_q` with a `meta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.parts import collect, read_floats, read_numbers
from loratools.quantization.common.protocol import PackedWeight, Part, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.packing import Integers
    from loratools.algebra.rounding import Floats

# Codes in one word of the packed tensor, and the bits of that word.
_PER_WORD = {8: (1, 8), 4: (2, 8), 3: (10, 32), 2: (4, 8), 1: (8, 8)}
_SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


@dataclass(frozen=True)
class HqqIntegers:
    """Unsigned integers with a scale and a zero point for each group, which runs along `axis` of the cut weight."""

    bits: int
    group: int
    axis: int

    @property
    def format(self) -> str:
        return f"int{self.bits}, axis {self.axis}"

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32. All of the weight is unpacked, since its rows are spread over the stored tensor."""
        import numpy as np

        from loratools.algebra.packing import onto_grid
        from loratools.storage.arrays import read_raw

        per_word, word_bits = _PER_WORD[self.bits]
        packed = read_raw(weight.tensor("W_q")).view(np.uint32 if word_bits == 32 else np.uint8)
        mask = (1 << self.bits) - 1
        shifts = range((per_word - 1) * self.bits, -1, -self.bits)
        codes: Integers = np.concatenate([(packed >> shift) & mask for shift in shifts])
        groups = math.prod(weight.shape) // self.group
        codes = codes[: groups if self.axis == 1 else self.group].reshape(
            (groups, self.group) if self.axis == 1 else (self.group, groups)
        )
        per_group = (groups, 1) if self.axis == 1 else (1, groups)
        zero = read_floats(weight.tensor("zero")).reshape(per_group)
        scale = read_floats(weight.tensor("scale")).reshape(per_group)
        values = onto_grid(codes.astype(np.float32) - zero, weight.dtype) * scale
        rows: Floats = onto_grid(values, weight.dtype).reshape(weight.shape)[start:stop]
        return rows


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise `W_q` tensors with a scale and a number of bits beside them."""
    return {
        f"{name.removesuffix('W_q')}weight": _recognised(name.removesuffix("W_q"), tensors)
        for name in tensors
        if name.endswith(".W_q") and {name.removesuffix("W_q") + part for part in ("scale", "nbits")} <= tensors.keys()
    }


def _recognised(stem: str, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    parts = collect(tensors, {role: stem + role for role in ("W_q", "scale", "zero", *_SETTINGS)})
    try:
        return _with_settings(parts)
    except (KeyError, ValueError) as error:
        return Unreadable("hqq", tuple(part.name for part in parts), f"its parts cannot be used ({error})")


def _with_settings(parts: tuple[Part, ...]) -> PackedWeight:
    """The weight that the stored settings describe; KeyError or ValueError if they are missing or contradictory."""
    by_role = {part.role: part.tensor for part in parts}
    codes, scale, zero = by_role["W_q"], by_role["scale"], by_role["zero"]
    (width,), (axis,) = read_numbers(by_role["nbits"]), read_numbers(by_role["axis"])
    shape = read_numbers(by_role["shape"])
    if any(read_numbers(by_role[flag])[0] for flag in ("quant_scale", "quant_zero") if flag in by_role):
        raise ValueError("its scales or zero points are quantised themselves")
    if width not in _PER_WORD or axis not in (0, 1) or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{width} bits along axis {axis} of {list(shape)}")
    if scale.dtype not in ("F32", "F16", "BF16") or zero.dtype != scale.dtype or zero.elements != scale.elements:
        raise ValueError(f"zero points of {zero.dtype} and {shape_text(zero.shape)}, scales of {scale.dtype}")
    elements, groups = math.prod(shape), scale.elements
    if not groups or elements % groups:
        raise ValueError(f"{groups} groups of {elements} values")
    per_word, word_bits = _PER_WORD[width]
    rows = groups if axis == 1 else elements // groups
    if codes.nbytes * 8 != -(-rows // per_word) * (elements // rows) * word_bits:
        raise ValueError(f"{codes.nbytes} bytes for {elements} codes of {width} bits")
    parameters = HqqIntegers(width, elements // groups, axis)
    # Neighbours in a byte are half a tensor apart.
    return PackedWeight("hqq", (shape[0], shape[1]), scale.dtype, parts, parameters, row_block=max(1, shape[0]))
