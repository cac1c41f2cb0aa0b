"""The common block types of ggml: bytes of blocks in, float32 out.

A block holds 32 values, or 256 in the K types, with one or two float16 scales; a K type has a scale of a few bits for
each 16 or 32 of them as well. Sums and products are in float32 and in the order in which llama.cpp forms them, so that
values are the same to the bit. Layouts: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from loratools.algebra.packing import E2M1, Bytes

Singles = NDArray[np.float32]

# The values of the 4-bit codes of IQ4_NL and IQ4_XS.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _half(blocks: Bytes, start: int) -> Singles:
    """The float16 at byte `start` of each block, as a column."""
    halves: Singles = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)
    return halves


def _halves_of_bytes(packed: Bytes) -> Bytes:
    """The lower four bits of all bytes, then the upper ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _bits_of_uint32(blocks: Bytes, start: int) -> Bytes:
    """The 32 bits of the word at byte `start`, lowest first."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")


def _q4_0(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * (_halves_of_bytes(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * _halves_of_bytes(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Singles:
    codes = _halves_of_bytes(blocks[:, 6:]) | (_bits_of_uint32(blocks, 2) << 4)
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Singles:
    codes = _halves_of_bytes(blocks[:, 8:]) | (_bits_of_uint32(blocks, 4) << 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * _IQ4[_halves_of_bytes(blocks[:, 2:])]


def _mxfp4(blocks: Bytes) -> Singles:
    # In ggml 255 is a power like the others, and codes stand for twice their value.
    power = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    values: Singles = power * (2 * np.array(E2M1, np.float32))[_halves_of_bytes(blocks[:, 1:])]
    return values


def _six_bits(scales: Bytes) -> tuple[Singles, Singles]:
    """Eight scales and eight minima of 6 bits each, in 12 bytes: four in the lower bits of the first bytes each, the
    others' lower halves in the last four bytes, and their upper bits in what is left of the first eight."""
    first, second, third = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    factors = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return factors.astype(np.float32), minima.astype(np.float32)


def _in_pairs(packed: Bytes) -> Bytes:
    """Eight times 32 codes: the lower halves of 32 bytes, then their upper halves, four times over."""
    chunks = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(len(packed), 8, 32)


def _q4_k(blocks: Bytes) -> Singles:
    factors, minima = _six_bits(blocks[:, 4:16])
    scale, offset = _half(blocks, 0) * factors, _half(blocks, 2) * minima
    values = scale[..., None] * _in_pairs(blocks[:, 16:]).astype(np.float32) - offset[..., None]
    return values.reshape(len(blocks), 256)


def _q5_k(blocks: Bytes) -> Singles:
    factors, minima = _six_bits(blocks[:, 4:16])
    scale, offset = _half(blocks, 0) * factors, _half(blocks, 2) * minima
    top = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _in_pairs(blocks[:, 48:]) | (top << 4)
    values = scale[..., None] * codes.astype(np.float32) - offset[..., None]
    return values.reshape(len(blocks), 256)


def _q6_k(blocks: Bytes) -> Singles:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2)
    two = (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    codes = (four | (two << 4)).astype(np.float32) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values: Singles = scale[..., None] * codes.reshape(-1, 16, 16)
    return values.reshape(len(blocks), 256)


def _two_bits(packed: Bytes) -> Bytes:
    """256 codes of two bits: of 32 bytes the lowest two bits, then the next two, and so on; twice."""
    fields: Bytes = (packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & np.uint8(3)
    return fields.reshape(-1, 16, 16)


def _q2_k(blocks: Bytes) -> Singles:
    scale = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    offset = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    values = scale[..., None] * _two_bits(blocks[:, 16:80]).astype(np.float32) - offset[..., None]
    return values.reshape(len(blocks), 256)


def _q3_k(blocks: Bytes) -> Singles:
    stored = blocks[:, 96:108]
    low = _halves_of_bytes(stored[:, :8])
    high = (stored[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    factors = (low | (high.reshape(-1, 16) << 4)).astype(np.float32) - 32
    scale = _half(blocks, 108) * factors
    top = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _two_bits(blocks[:, 32:96]).astype(np.float32) - (4 - 4 * top.reshape(-1, 16, 16).astype(np.float32))
    return (scale[..., None] * codes).reshape(len(blocks), 256)


def _iq4_xs(blocks: Bytes) -> Singles:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16)
    top = (high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | (top << 4)).astype(np.float32) - 32)
    packed = blocks[:, 8:].reshape(-1, 8, 16)
    codes = np.concatenate([packed & 15, packed >> 4], axis=2)
    values: Singles = scale[..., None] * _IQ4[codes]
    return values.reshape(len(blocks), 256)


DECODERS: dict[str, Callable[[Bytes], Singles]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs,
}  # fmt: skip
