"""GGUF: the block types of ggml, from Q4_0 to the K and IQ types.

    token_embd.weight   blocks of 32 or 256 values along a row, each with one or two scales

Which type a tensor has is in the file's header. Values are float32, as llama.cpp dequantises them. The common types are
unpacked here; for the others the package `gguf` is needed (`pip install 'loratools[gguf]'`).
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
    from loratools.algebra.rounding import Floats

_SIZES = {kind: (values, size) for kind, values, size in BLOCK_TYPES.values()}
# llama.cpp computes activations with the first two and dequantises them nowhere, and no package does the third.
_NOT_WEIGHTS = ("Q8_1", "Q8_K", "Q1_0")


@dataclass(frozen=True)
class GgmlBlocks:
    """Blocks of one ggml type along a row."""

    format: str

    @property
    def bits(self) -> float:
        """Bits of a value, its share of the block's scales included, as the types are usually described."""
        values, size = _SIZES[self.format]
        return 8 * size / values

    @property
    def group(self) -> int | None:
        return _SIZES[self.format][0]

    def dequantise(self, weight: PackedWeight, start: int, stop: int) -> Floats:
        """Rows as float32.

        Raises:
            UnsupportedError: the type is a rarer one, and the package `gguf` is not installed.
        """
        import numpy as np

        from loratools.algebra.ggml import DECODERS
        from loratools.storage.arrays import read_raw

        stored = read_raw(weight.tensor("blocks"), start, stop)
        _, size = _SIZES[self.format]
        decode = DECODERS.get(self.format)
        shape = (stop - start, *weight.shape[1:])
        if 0 in shape:  # the package gguf cannot cut no blocks into parts
            return np.zeros(shape, np.float32)
        # A scale that is no number is told of by whoever looks at the values.
        with np.errstate(invalid="ignore", over="ignore"):
            if decode is not None:
                return decode(stored.reshape(-1, size)).reshape(shape)
            return _by_package(stored.reshape(-1, size), self.format).reshape(shape)


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
    """Tensors whose header gives them a block type."""
    recognised: dict[str, PackedWeight | Unreadable] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor.source, BlockTensor):
            continue
        kind, shape = tensor.source.kind, tensor.source.logical
        if kind in _NOT_WEIGHTS:
            recognised[name] = Unreadable("gguf", (name,), f"values of the ggml type {kind} are not unpacked")
        else:
            recognised[name] = PackedWeight("gguf", shape, "F32", (Part("blocks", name, tensor),), GgmlBlocks(kind))
    return recognised
