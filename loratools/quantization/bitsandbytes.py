"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8().

    4 bit   weight U8 (n / 2, 1), weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 | __fp4
    nested  also weight.nested_absmax, weight.nested_quant_map: absmax itself is quantised to bytes in blocks of 256
    8 bit   weight I8 (out, in), SCB (out)

The names are those of transformers. Blocks run over the flattened weight; the upper half of a byte comes first:

    W[i] = quant_map[code[i]] * absmax[i // blocksize]         rounded to the dtype of the state
    absmax[j] = nested_quant_map[byte[j]] * nested_absmax[j // 256] + nested_offset
    W = weight * SCB[:, None] / 127                            8 bit, in float32
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.parts import collect, read_bytes_between, read_flat, read_floats
from loratools.quantization.common.protocol import PackedWeight, Part, Recognised, Unreadable
from loratools.tensors.dtypes import DTYPE_BITS, parse_float_dtype
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

_STATE = ".quant_state.bitsandbytes__"
# bitsandbytes multiplies by this constant instead of dividing by 127.
_PER_STEP = 7.874015718698502e-3
_MOST_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class FourBit:
    """Blocks of 4-bit codes with a scale each, over the flattened weight.

    codes   nf4 or fp4 group   values that share a scale nested_blocksize, nested_offset   of scales that are quantised
    themselves; None if they are float32
    """

    codes: str
    group: int
    nested_blocksize: int | None = None
    nested_offset: float = 0.0
    bits: int = 4

    @property
    def format(self) -> str:
        """The number format in words: `nf4` or `fp4`, and whether the scales are quantised too."""
        return self.codes if self.nested_blocksize is None else f"{self.codes}, double quantisation"

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product in float32, rounded once to the weight's dtype."""
        import numpy as np

        from loratools.algebra.packing import decode_pairs, onto_grid, pairs_of_values

        columns = math.prod(weight.shape[1:])
        first, last = start * columns, stop * columns
        if first == last:
            return np.empty((0, *weight.shape[1:]), np.float32)
        table = pairs_of_values(read_floats(weight.tensor("quant_map")).reshape(-1), high_first=True)
        packed = read_bytes_between(weight.tensor("weight"), first // 2, -(-last // 2))
        values: Floats = decode_pairs(packed, table)[first % 2 :][: last - first]
        block, end = first // self.group, -(-last // self.group)
        scales = self._scales(weight, block, end)
        if first % self.group == 0 and last % self.group == 0:
            values = (values.reshape(-1, self.group) * scales[:, None]).reshape(-1)
        else:
            skipped = first - block * self.group
            values = values * np.repeat(scales, self.group)[skipped : skipped + len(values)]
        return onto_grid(values.reshape(stop - start, *weight.shape[1:]), weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import unpack_bits

        shape = (stop - start, *weight.shape[1:])
        columns = math.prod(weight.shape[1:])
        first, last = start * columns, stop * columns
        packed = read_bytes_between(weight.tensor("weight"), first // 2, -(-last // 2))
        # The upper half of a byte comes first.
        codes = unpack_bits(packed, 4).reshape(-1, 2)[:, ::-1].reshape(-1)[first % 2 :][: last - first]
        block, end = first // self.group, -(-last // self.group)
        scales = np.repeat(self._scales(weight, block, end), self.group)[first - block * self.group :]
        values = read_floats(weight.tensor("quant_map")).reshape(-1)
        return LevelGrid(
            values, np.arange(16), codes.reshape(shape), scales[: last - first].reshape(shape), weight.dtype
        )

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        columns = math.prod(weight.shape[1:])
        first, last = start * columns, stop * columns
        upper_first = packed[first // 2 : -(-last // 2)]
        halves = np.stack([upper_first >> 4, upper_first & 15], axis=1).reshape(-1)
        halves[first % 2 :][: last - first] = codes.reshape(-1)
        upper_first[...] = (halves[::2] << 4) | halves[1::2]

    def _scales(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        import numpy as np

        scales = read_flat(weight.tensor("absmax"), start, stop)
        if self.nested_blocksize is None:
            return scales
        first, last = start // self.nested_blocksize, -(-stop // self.nested_blocksize)
        outer = read_flat(weight.tensor("nested_absmax"), first, last)
        outer = np.repeat(outer, self.nested_blocksize)[start - first * self.nested_blocksize :][: stop - start]
        table = read_floats(weight.tensor("nested_quant_map")).reshape(-1)
        nested: Floats = table[scales.astype(np.intp)] * outer + np.float32(self.nested_offset)
        return nested


@dataclass(frozen=True)
class Int8:
    """Integers of 8 bits, and the largest magnitude of each row."""

    format: str = "int8"
    bits: int = 8
    group: None = None

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32, the dtype in which bitsandbytes dequantises."""
        import numpy as np

        values = read_floats(weight.tensor("weight"), start, stop)
        values *= read_floats(weight.tensor("SCB"), start, stop).reshape(-1, 1)
        values *= np.float32(_PER_STEP)
        return values

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid
        from loratools.algebra.packing import signed_bytes
        from loratools.storage.arrays import read_raw

        codes = read_raw(weight.tensor("weight"), start, stop).view(np.uint8)
        rows = read_floats(weight.tensor("SCB"), start, stop).reshape(-1, 1)
        # bitsandbytes writes -127 to 127.
        return LevelGrid(signed_bytes(), np.delete(np.arange(256), 128), codes, rows, weight.dtype, factor=_PER_STEP)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        packed.reshape(weight.shape)[start:stop] = codes


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise weights with a quantisation state, and int8 weights with a constant for each row."""
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        if tensor.dtype == "I8" and name.endswith("weight") and name.removesuffix("weight") + "SCB" in tensors:
            recognised[name] = _int8(name, tensors)
        # bitsandbytes can store the packed bytes as another dtype of the same bits (bnb_4bit_quant_storage).
        elif name in states or (tensor.dtype == "U8" and {f"{name}.absmax", f"{name}.quant_map"} <= tensors.keys()):
            recognised[name] = _four_bit(name, states.get(name), tensors)
    return recognised


def _int8(name: str, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    module = name.removesuffix("weight")
    parts = collect(tensors, {"weight": name, "SCB": f"{module}SCB", "weight_format": f"{module}weight_format"})
    weight, constants = parts[0].tensor, parts[1].tensor
    if len(weight.shape) != 2 or constants.elements != weight.shape[0] or constants.dtype != "F32":
        why = f"SCB of shape {shape_text(constants.shape)} for a weight of {shape_text(weight.shape)}"
        return Unreadable("bitsandbytes", tuple(part.name for part in parts), why)
    return PackedWeight("bitsandbytes", weight.shape, "F32", parts, Int8())


def _four_bit(name: str, state_name: str | None, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    names = {
        role: f"{name}.{role}" if role != "weight" else name
        for role in ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map")
    }
    parts = collect(tensors, {**names, **({"quant_state": state_name} if state_name is not None else {})})
    stored = tuple(part.name for part in parts)
    if state_name is None:
        return Unreadable("bitsandbytes", stored, "it has no quant_state, which states the shape and the block size")
    try:
        return _with_state(parts, state_name.partition(_STATE)[2], _state(tensors[state_name]))
    except (KeyError, TypeError, ValueError) as error:
        return Unreadable("bitsandbytes", stored, f"its quant_state cannot be used ({error})")


def _state(tensor: LazyTensor) -> Mapping[str, object]:
    """The JSON that bitsandbytes stores as bytes; read without numpy, since `inspect` reads it."""
    from loratools.storage.files import read_bytes

    if tensor.nbytes > _MOST_STATE_BYTES:
        raise ValueError(f"it has {tensor.nbytes:,} bytes")
    data = read_bytes(tensor.location) if tensor.location is not None else bytes(tensor.read().tolist())
    state = json.loads(data.decode("utf-8"))
    if not isinstance(state, dict):
        raise TypeError("it is not a JSON object")
    return state


def _with_state(parts: tuple[Part, ...], codes: str, state: Mapping[str, object]) -> PackedWeight:
    """The weight that the state describes; ValueError if the sizes of the parts do not match it."""
    shape, blocksize, dtype = state["shape"], state["blocksize"], parse_float_dtype(str(state["dtype"]))
    if not isinstance(shape, list) or not shape or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape {shape}")
    if not isinstance(blocksize, int) or blocksize < 1 or blocksize % 2:
        raise ValueError(f"blocksize {blocksize}")
    if codes not in ("nf4", "fp4") or dtype not in ("F32", "F16", "BF16"):
        raise ValueError(f"codes {codes} of dtype {state['dtype']}")
    nested = "nested_blocksize" in state
    elements = math.prod(shape)
    blocks = -(-elements // blocksize)
    sizes = {part.role: part.tensor for part in parts}
    outer = state.get("nested_blocksize")
    if nested and (not isinstance(outer, int) or outer < 1):
        raise ValueError(f"nested_blocksize {outer}")
    expected_sizes = {"absmax": blocks, "quant_map": 16}
    if isinstance(outer, int):
        expected_sizes |= {"nested_absmax": -(-blocks // outer), "nested_quant_map": 256}
    if wrong := [
        f"{role} of {sizes[role].elements}" for role, count in expected_sizes.items() if sizes[role].elements != count
    ]:
        raise ValueError(f"{', '.join(wrong)} for a weight of {elements} values")
    if (sizes["absmax"].dtype == "U8") != nested or DTYPE_BITS[sizes["weight"].dtype] < 8:
        raise ValueError(f"absmax of dtype {sizes['absmax'].dtype}")
    if sizes["weight"].nbytes < -(-elements // 2):
        raise ValueError(f"{sizes['weight'].nbytes} bytes for {elements} values")
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, (int, float)):
        raise TypeError(f"nested_offset {offset}")
    parameters = FourBit(codes, blocksize, outer if isinstance(outer, int) else None, float(offset))
    return PackedWeight("bitsandbytes", tuple(shape), dtype, parts, parameters)
