"""GGUF: the block types of ggml, from Q4_0 to the K and IQ types.

    token_embd.weight   blocks of 32 or 256 values along a row, each with one or two scales

The type of a tensor is in the header of the file. Values are float32, as llama.cpp dequantises them. The common types
are unpacked here, and can be stored again with their existing scales. The others need the package `gguf` (`pip install
'loratools[gguf]'`) and can only be read: their blocks are entries of code books, or no Python package writes them. A
few types can store values with new scales (`Fresh`), so that a weight can change its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError
from loratools.quantization.common.protocol import PackedWeight, Part, Recognised, Unreadable
from loratools.storage.gguf_reader import BLOCK_TYPES, BlockTensor
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.level_grid import LevelGrid
    from loratools.algebra.packing import Bytes, Integers
    from loratools.algebra.rounding import Floats

_SIZES = {kind: (values, size) for kind, values, size in BLOCK_TYPES.values()}
# The types that can be written, and among them those that can be written with new scales.
_WRITTEN = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS",
})  # fmt: skip
_FRESH = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})
# llama.cpp uses the first two for activations only and never dequantises them; no package dequantises the third.
_NOT_WEIGHTS = ("Q8_1", "Q8_K", "Q1_0")


@dataclass(frozen=True)
class GgmlBlocks:
    """Blocks of one ggml type along a row."""

    format: str

    @property
    def bits(self) -> float:
        """Bits of a value including its share of the block's scales, as types are usually described."""
        values, size = _SIZES[self.format]
        return 8 * size / values

    @property
    def group(self) -> int | None:
        return _SIZES[self.format][0]

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32.

        Raises:
            UnsupportedError: The type is a rare one, and the package `gguf` is not installed.
        """
        import numpy as np

        from loratools.algebra.ggml import TYPES
        from loratools.storage.arrays import read_raw

        stored = read_raw(weight.tensor("blocks"), start, stop)
        _, size = _SIZES[self.format]
        known = TYPES.get(self.format)
        shape = (stop - start, *weight.shape[1:])
        if 0 in shape:  # the package gguf cannot split an empty block array
            return np.zeros(shape, np.float32)
        # Whoever checks the values reports a NaN scale.
        with np.errstate(invalid="ignore", over="ignore"):
            if known is not None:
                return known.decode(stored.reshape(-1, size)).reshape(shape)
            return _by_package(stored.reshape(-1, size), self.format).reshape(shape)


@dataclass(frozen=True)
class WritableBlocks(GgmlBlocks):
    """Blocks of a type in which each code stands for one value, so that codes can be changed under the same scales."""

    def grid(self, weight: PackedWeight, start: int, stop: int) -> LevelGrid:
        import numpy as np

        from loratools.algebra.ggml import TYPES
        from loratools.algebra.level_grid import LevelGrid
        from loratools.storage.arrays import read_raw

        known = TYPES[self.format]
        blocks = read_raw(weight.tensor("blocks"), start, stop).reshape(-1, _SIZES[self.format][1])
        codes = known.codes(blocks)
        shape = (stop - start, *weight.shape[1:])

        def of_values(of_groups: Floats) -> Floats:
            return np.repeat(of_groups, codes.shape[1] // of_groups.shape[1], axis=1).reshape(shape)

        with np.errstate(invalid="ignore", over="ignore"):
            offset = of_values(known.offsets(blocks)) if known.offsets is not None else None
            scale = of_values(known.scales(blocks))
        allowed = np.arange(len(known.levels))
        if self.format == "Q8_0":
            allowed = allowed[known.levels != -128]  # never written by llama.cpp, whose kernels may not expect it
        return LevelGrid(known.levels, allowed, codes.reshape(shape), scale, weight.dtype, offset=offset)

    def pack(self, weight: PackedWeight, codes: Integers, start: int, stop: int, packed: Bytes) -> None:
        import numpy as np

        from loratools.algebra.ggml import TYPES

        blocks = self._blocks(weight, start, stop, packed)
        TYPES[self.format].store_codes(blocks, codes.astype(np.uint8).reshape(len(blocks), -1))

    def _blocks(self, weight: PackedWeight, start: int, stop: int, packed: Bytes) -> Bytes:
        """A view of the blocks of rows start:stop."""
        return packed.reshape(weight.shape[0], -1)[start:stop].reshape(-1, _SIZES[self.format][1])


@dataclass(frozen=True)
class FreshBlocks(WritableBlocks):
    """Blocks of a type that llama.cpp quantises with a formula, and not with a search for scales."""

    def quantise(self, weight: PackedWeight, values: Floats, start: int, stop: int, packed: Bytes) -> None:
        from loratools.algebra.ggml_quantise import quantise

        self._blocks(weight, start, stop, packed)[...] = quantise(self.format, values, _SIZES[self.format][1])


def blocks_of(kind: str) -> GgmlBlocks:
    """The parameters of a ggml type by its name."""
    if kind in _FRESH:
        return FreshBlocks(kind)
    return WritableBlocks(kind) if kind in _WRITTEN else GgmlBlocks(kind)


def packed_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the bytes of a tensor in blocks of that type; None if its rows are not a whole number of blocks."""
    values, size = _SIZES[kind]
    return (*shape[:-1], shape[-1] // values * size) if shape and shape[-1] % values == 0 else None


@dataclass(frozen=True)
class Unwritten:
    """The source of blocks that a merge has yet to write: they have a shape, and no bytes."""

    @property
    def location(self) -> None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        raise AssertionError("blocks are read before they are written")

    def scalar(self) -> float:
        raise AssertionError("blocks are read before they are written")


def _by_package(blocks: Floats, kind: str) -> Floats:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UnsupportedError(
            f"values of the ggml type {kind} are unpacked by the package gguf, which is not installed",
            hint="pip install 'loratools[gguf]'",
        ) from error
    values: Floats = dequantize(blocks, GGMLQuantizationType[kind])
    return values


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Recognised:
    """Recognise tensors whose header gives them a block type."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor.source, BlockTensor):
            continue
        kind, shape = tensor.source.kind, tensor.source.logical
        if kind in _NOT_WEIGHTS:
            recognised[name] = Unreadable("gguf", (name,), f"values of the ggml type {kind} cannot be unpacked")
        else:
            recognised[name] = PackedWeight("gguf", shape, "F32", (Part("blocks", name, tensor),), blocks_of(kind))
    return recognised
