"""optimum-quanto: the parts of its tensor subclass, behind the weight's name.

    8 bit     weight._data I8 | F8 (out, in)   weight._scale (out, 1) or ()
    2, 4 bit  weight._data._data U8            weight._scale, weight._shift

    W = _scale * _data      8 bit, rounded to the dtype of the scale

No file has the plain name `weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.eight_bits import eight_bit_format
from loratools.quantization.common.parts import collect, read_floats
from loratools.quantization.common.protocol import PackedWeight, Recognised, Unreadable
from loratools.tensors.dtypes import FLOAT8_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.rounding import Floats


@dataclass(frozen=True)
class ScaledBytes:
    """Integers or floats of 8 bits, with a scale for the tensor or for each row."""

    format: str
    bits: int = 8
    group: None = None

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product, rounded once to the dtype of the scale."""
        from loratools.algebra.packing import onto_grid

        scale = weight.tensor("scale")
        values = read_floats(weight.tensor("data"), start, stop)
        if scale.elements == 1:
            values *= read_floats(scale).reshape(-1)[0]
        else:
            values *= read_floats(scale, start, stop).reshape(-1, 1)
        return onto_grid(values, weight.dtype)


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise `_data` tensors whose weight has a `_scale`."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        weight = name.partition("._data")[0]
        if not name.endswith("._data") or f"{weight}._scale" not in tensors:
            continue
        parts = collect(tensors, {"data": name, "scale": f"{weight}._scale", "shift": f"{weight}._shift"})
        stored, scale = tuple(part.name for part in parts), tensors[f"{weight}._scale"]
        rows = tensor.shape[0] if tensor.shape else 0
        if name.endswith("._data._data") or len(parts) == 3:
            recognised[weight] = Unreadable("quanto", stored, "packed integers of 2 and 4 bits are not unpacked")
        elif (
            len(tensor.shape) != 2
            or tensor.dtype not in ("I8", *FLOAT8_DTYPES)
            or (scale.elements != 1 and scale.shape not in ((rows,), (rows, 1)))
        ):
            why = f"a scale of {shape_text(scale.shape)} for {tensor.dtype} of {shape_text(tensor.shape)}"
            recognised[weight] = Unreadable("quanto", stored, why)
        elif scale.dtype not in ("F32", "F16", "BF16"):
            recognised[weight] = Unreadable("quanto", stored, f"a scale of dtype {scale.dtype}")
        else:
            recognised[weight] = PackedWeight(
                "quanto", tensor.shape, scale.dtype, parts, ScaledBytes(eight_bit_format(tensor.dtype))
            )
    return recognised
