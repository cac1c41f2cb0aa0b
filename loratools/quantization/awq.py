"""AWQ: 4-bit integers packed along the outputs.

    GEMM   qweight I32 (in, out / 8)   qzeros I32 (in / group, out / 8)   scales (in / group, out)
    GEMV   qweight I32 (out, in / 8)   scales (out, groups, padded)

    W[o, i] = (code[i, o] - zero[i // group, o]) * scales[i // group, o]

A word holds eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, from its lowest four bits on.

GPTQ has the same keys; it packs along the inputs, and has a g_idx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.quantization.common.grouped import over_groups, scaled
from loratools.quantization.common.packed import packs_outputs, quantised_modules, scales_of_rows
from loratools.quantization.common.parts import collect, read_columns
from loratools.quantization.common.protocol import PackedWeight, Recognised, Unreadable
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

if TYPE_CHECKING:
    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats, Stored

# The position of the outputs 0 to 7 in a word, in units of four bits.
_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
# How many values are unpacked together: the packed numbers of some rows are spread over the stored tensor.
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True)
class AwqIntegers:
    """Unsigned integers of 4 bits with a scale and a zero point for each group of inputs.

    group  number of inputs that share a scale; None if all do
    """

    group: int | None
    format: str = "int4 gemm"
    bits: int = 4

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32: the product, rounded once to the dtype of the scales."""
        scales, zeros = _groups(weight, start, stop)
        return scaled(_codes(weight, start, stop), scales, zeros, weight.dtype)

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.level_grid import LevelGrid

        scales, zeros = (over_groups(n, weight.shape[1]) for n in _groups(weight, start, stop))
        levels = np.arange(16)
        codes = _codes(weight, start, stop)
        return LevelGrid(levels.astype(np.float32), levels, codes, scales, weight.dtype, zero=zeros)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.packing import pack_bits

        outputs = np.ascontiguousarray(codes.T).astype(np.uint8).reshape(weight.shape[1], -1, 8)
        stream = np.empty_like(outputs)
        stream[:, :, list(_POSITIONS)] = outputs
        words = pack_bits(stream.reshape(weight.shape[1], -1), 4).view("<i4")
        packed.view("<i4").reshape(weight.tensor("qweight").shape)[:, start // 8 : stop // 8] = words


def _codes(weight: PackedWeight, start: int, stop: int) -> Bytes:
    import numpy as np

    words = read_columns(weight.tensor("qweight"), start // 8, -(-stop // 8))
    return np.ascontiguousarray(_outputs(words)[:, : stop - start].T)


def _groups(weight: PackedWeight, start: int, stop: int) -> tuple[Floats, Floats]:
    """Scales and zero points of rows start:stop, (rows, groups), in float32."""
    import numpy as np

    zeros = _outputs(read_columns(weight.tensor("qzeros"), start // 8, -(-stop // 8)))[:, : stop - start]
    return scales_of_rows(weight, start, stop), zeros.T.astype(np.float32)


def _outputs(packed: Stored) -> Bytes:
    """The 4-bit integers of words, in the order of the outputs: (rows, words) -> (rows, 8 * words)."""
    import numpy as np

    from loratools.algebra.packing import unpack_bits

    stream = unpack_bits(np.ascontiguousarray(packed).view(np.uint8), 4)
    ordered: Bytes = stream.reshape(len(packed), -1, 8)[:, :, list(_POSITIONS)].reshape(len(packed), -1)
    return ordered


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise `qweight` tensors that have no g_idx, and fewer columns than their scales (or, in GEMV, than rows)."""
    modules = [module for module in quantised_modules(tensors) if packs_outputs(module, tensors)]
    return {f"{module}.weight": _recognised(module, tensors) for module in modules}


def _recognised(module: str, tensors: Mapping[str, LazyTensor]) -> PackedWeight | Unreadable:
    parts = collect(tensors, {role: f"{module}.{role}" for role in ("qweight", "qzeros", "scales")})
    by_role = {part.role: part.tensor for part in parts}
    stored = tuple(part.name for part in parts)
    codes, zeros, scales = (by_role.get(role) for role in ("qweight", "qzeros", "scales"))
    assert codes is not None, "checked by `quantised_modules`"
    if zeros is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
        return Unreadable("awq", stored, "it has no zero points or scales of two axes")
    inputs, outputs, groups = codes.shape[0], codes.shape[1] * 8, scales.shape[0]
    gemm = scales.shape == (groups, outputs) and zeros.shape == (groups, codes.shape[1])
    if not gemm or codes.dtype != "I32" or zeros.dtype != "I32" or scales.dtype not in ("F32", "F16", "BF16"):
        shapes = ", ".join(f"{part.role} {shape_text(part.tensor.shape)}" for part in parts)
        return Unreadable(
            "awq", stored, f"its parts are not those of the GEMM layout, which is the one that is read: {shapes}"
        )
    if not groups or inputs % groups:
        return Unreadable("awq", stored, f"{groups} groups of {inputs} inputs")
    group = inputs // groups if groups > 1 else None
    row_block = max(32, _BLOCK_VALUES // max(1, inputs) // 32 * 32)
    return PackedWeight("awq", (outputs, inputs), scales.dtype, parts, AwqIntegers(group), row_block)
