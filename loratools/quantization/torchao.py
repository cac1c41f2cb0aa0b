"""torchao: a tensor subclass stored as its parts.

    _weight_qdata I8 | F8 (out, in)   _weight_scale (), (out, 1) or (out, in / group)   _weight_zero_point as the scale

    W = (qdata - zero_point) * scale      in float32, rounded once to the model's dtype

Its layouts of 4-bit integers depend on kernels (tiles, interleaved words) and cannot be read. Older files are pickles
of the subclass itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.config import model_dtype
from loratools.quantization.common.eight_bits import eight_bit_format
from loratools.quantization.common.grouped import over_groups
from loratools.quantization.common.parts import collect, read_floats, read_groups
from loratools.quantization.common.protocol import PackedWeight, Recognised, Unreadable
from loratools.tensors.dtypes import FLOAT8_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats

_SCHEME = "torchao"
_ROLES = (
    "scale", "scale_and_zero", "zero_point", "act_pre_scale", "act_quant_scale", "act_quant_zero_point", "group_scale",
    "group_zero", "row_scale",
)  # fmt: skip


@dataclass(frozen=True)
class ScaledRows:
    """Integers or floats of 8 bits, with a scale for the tensor, each row, or groups of a row."""

    format: str
    group: int | None
    bits: int = 8

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product in float32, rounded once to the weight's dtype."""
        from loratools.algebra.packing import onto_grid

        values = read_floats(weight.tensor("qdata"), start, stop)
        columns = values.shape[1]
        if weight.has("zero_point"):
            values -= over_groups(read_groups(weight.tensor("zero_point"), start, stop), columns)
        values *= over_groups(read_groups(weight.tensor("scale"), start, stop), columns)
        return onto_grid(values, weight.dtype)


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise `_qdata` tensors with a scale: `X._weight_qdata` is the weight `X.weight`."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name in tensors:
        stem = name.removesuffix("qdata")
        if not name.endswith("_qdata") or not any(stem + role in tensors for role in ("scale", "scale_and_zero")):
            continue
        module, dot, leaf = stem.removesuffix("_").rpartition(".")
        recognised[module + dot + leaf.removeprefix("_")] = _recognised(name, stem, tensors, config)
    return recognised


def _recognised(
    name: str, stem: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, object]
) -> PackedWeight | Unreadable:
    parts = collect(tensors, {"qdata": name, **{role: stem + role for role in _ROLES}})
    by_role = {part.role: part.tensor for part in parts}
    stored = tuple(part.name for part in parts)
    numbers, scale, zero = by_role["qdata"], by_role.get("scale"), by_role.get("zero_point")
    if "act_pre_scale" in by_role:
        return Unreadable(_SCHEME, stored, "its inputs are scaled before they reach the weight")
    if scale is None or len(numbers.shape) != 2 or numbers.dtype not in ("I8", *FLOAT8_DTYPES):
        return Unreadable(
            _SCHEME, stored, f"qdata of {numbers.dtype} and shape {shape_text(numbers.shape)}, a kernel's layout"
        )
    rows = numbers.shape[0]
    fits = scale.elements == 1 or (scale.shape[:1] == (rows,) and len(scale.shape) <= 2)
    if not fits or scale.dtype not in ("F32", "F16", "BF16") or (zero is not None and zero.elements != scale.elements):
        return Unreadable(
            _SCHEME, stored, f"a scale of {scale.dtype} and {shape_text(scale.shape)} for {shape_text(numbers.shape)}"
        )
    groups = scale.elements // rows if scale.elements > 1 else 1
    if numbers.shape[1] % groups:
        return Unreadable(_SCHEME, stored, f"{groups} groups of {numbers.shape[1]} columns")
    dtype = scale.dtype if scale.dtype != "F32" else model_dtype(config) or "F32"
    columns = numbers.shape[1] // groups if groups > 1 else None
    return PackedWeight(_SCHEME, numbers.shape, dtype, parts, ScaledRows(eight_bit_format(numbers.dtype), columns))
