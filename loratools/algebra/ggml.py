"""The common block types of ggml: codes and scales in the bytes of blocks, and their values in float32.

A block holds 32 values, or 256 in the K types, with one or two float16 scales; a K type has a scale of a few bits for
each 16 or 32 of them as well. Sums and products are in float32 and in the order in which llama.cpp forms them, so that
values are the same to the bit. Layouts: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratools.algebra.packing import E2M1, Bytes

Singles = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class BlockType:
    """How the blocks of one ggml type are laid out: `value = level * scale + offset`.

    Attributes:
        levels: The unscaled value of each code.
        codes: The codes in blocks: (blocks, bytes) -> (blocks, values).
        store_codes: Writes codes into blocks, in place, without changing their scales.
        scales: A scale for each group of a block: (blocks, bytes) -> (blocks, groups).
        offsets: An offset for each group of a block: (blocks, bytes) -> (blocks, groups); None if there is none.
    """

    levels: Singles
    codes: Callable[[Bytes], Bytes]
    store_codes: Callable[[Bytes, Bytes], None]
    scales: Callable[[Bytes], Singles]
    offsets: Callable[[Bytes], Singles] | None = None

    def decode(self, blocks: Bytes) -> Singles:
        """The values of blocks, (blocks, values)."""
        levels = self.levels[self.codes(blocks)]
        scales = self.scales(blocks)
        values: Singles = levels.reshape(*scales.shape, -1) * scales[..., None]
        if self.offsets is not None:
            values += self.offsets(blocks)[..., None]
        return values.reshape(levels.shape)


def _half(blocks: Bytes, start: int) -> Singles:
    """The float16 at byte `start` of each block, as a column."""
    halves: Singles = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)
    return halves


def _half_at(start: int) -> Callable[[Bytes], Singles]:
    return lambda blocks: _half(blocks, start)


def _integers(first: int, count: int) -> Singles:
    return np.arange(first, first + count).astype(np.float32)


# Codes of 32 values: the lower four bits of all bytes, then the upper ones; a fifth bit of each in a word.


def _halves_of_bytes(packed: Bytes) -> Bytes:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _nibbles_at(start: int) -> Callable[[Bytes], Bytes]:
    return lambda blocks: _halves_of_bytes(blocks[:, start : start + 16])


def _put_nibbles_at(start: int) -> Callable[[Bytes, Bytes], None]:
    def store(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, start : start + 16] = (codes[:, :16] & 15) | (codes[:, 16:] << 4)

    return store


def _five_bits_at(word: int) -> Callable[[Bytes], Bytes]:
    """The word of fifth bits begins at byte `word`, and the other four bits follow it."""

    def codes(blocks: Bytes) -> Bytes:
        fifth = np.unpackbits(blocks[:, word : word + 4], axis=1, bitorder="little")
        five: Bytes = _halves_of_bytes(blocks[:, word + 4 :]) | (fifth << np.uint8(4))
        return five

    return codes


def _put_five_bits_at(word: int) -> Callable[[Bytes, Bytes], None]:
    put_nibbles = _put_nibbles_at(word + 4)

    def store(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, word : word + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        put_nibbles(blocks, codes)

    return store


def _bytes_from_2(blocks: Bytes) -> Bytes:
    return blocks[:, 2:]


def _put_bytes_from_2(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = codes


def _powers_of_mxfp4(blocks: Bytes) -> Singles:
    # In ggml 255 is a power like the others, and codes stand for twice their value.
    powers: Singles = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return powers


# K types: 256 codes in chunks of 64 or 128, and scales of a few bits.


def _six_bits(scales: Bytes) -> tuple[Singles, Singles]:
    """Eight scales and eight minima of 6 bits each, in 12 bytes. Of each, the first four are in the lower bits of the
    first eight bytes. The lower halves of the others are in the last four bytes, and their upper bits in the remaining
    bits of the first eight.
    """
    first, second, third = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    factors = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return factors.astype(np.float32), minima.astype(np.float32)


def _scales_of_eight(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * _six_bits(blocks[:, 4:16])[0]


def _minima_of_eight(blocks: Bytes) -> Singles:
    return -(_half(blocks, 2) * _six_bits(blocks[:, 4:16])[1])


def _in_pairs(packed: Bytes) -> Bytes:
    """Eight times 32 codes: the lower halves of 32 bytes, then their upper halves, four times."""
    chunks = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(len(packed), 256)


def _put_in_pairs(packed: Bytes, codes: Bytes) -> None:
    pairs = codes.reshape(len(codes), 4, 2, 32) & 15
    packed[...] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(codes), 128)


def _bits_of_bytes(packed: Bytes) -> Bytes:
    """256 bits: the lowest of each of 32 bytes, then the next, and so on."""
    bits: Bytes = (packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return bits.reshape(len(packed), 256)


def _put_bits_of_bytes(packed: Bytes, bits: Bytes) -> None:
    shifted = bits.reshape(len(bits), 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    packed[...] = np.bitwise_or.reduce(shifted, axis=1)


def _two_bits(packed: Bytes) -> Bytes:
    """256 codes of two bits: of 32 bytes the lowest two bits, then the next two, and so on; twice."""
    fields: Bytes = (packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & np.uint8(3)
    return fields.reshape(-1, 256)


def _put_two_bits(packed: Bytes, codes: Bytes) -> None:
    shifted = (codes.reshape(-1, 2, 4, 32) & 3) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    packed[...] = np.bitwise_or.reduce(shifted, axis=2).reshape(len(codes), 64)


def _codes_of_q4_k(blocks: Bytes) -> Bytes:
    return _in_pairs(blocks[:, 16:])


def _put_q4_k(blocks: Bytes, codes: Bytes) -> None:
    _put_in_pairs(blocks[:, 16:], codes)


def _codes_of_q5_k(blocks: Bytes) -> Bytes:
    codes: Bytes = _in_pairs(blocks[:, 48:]) | (_bits_of_bytes(blocks[:, 16:48]) << np.uint8(4))
    return codes


def _put_q5_k(blocks: Bytes, codes: Bytes) -> None:
    _put_in_pairs(blocks[:, 48:], codes)
    _put_bits_of_bytes(blocks[:, 16:48], codes >> np.uint8(4))


def _codes_of_q6_k(blocks: Bytes) -> Bytes:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 256)
    codes: Bytes = four | (_two_bits(blocks[:, 128:192]) << np.uint8(4))
    return codes


def _put_q6_k(blocks: Bytes, codes: Bytes) -> None:
    four = codes.reshape(-1, 2, 4, 32) & 15
    blocks[:, :128] = (four[:, :, :2] | (four[:, :, 2:] << 4)).reshape(-1, 128)
    _put_two_bits(blocks[:, 128:192], codes >> np.uint8(4))


def _scales_of_q6_k(blocks: Bytes) -> Singles:
    scales: Singles = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return scales


def _codes_of_q2_k(blocks: Bytes) -> Bytes:
    return _two_bits(blocks[:, 16:80])


def _put_q2_k(blocks: Bytes, codes: Bytes) -> None:
    _put_two_bits(blocks[:, 16:80], codes)


def _scales_of_q2_k(blocks: Bytes) -> Singles:
    return _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)


def _minima_of_q2_k(blocks: Bytes) -> Singles:
    return -(_half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32))


def _codes_of_q3_k(blocks: Bytes) -> Bytes:
    codes: Bytes = _two_bits(blocks[:, 32:96]) | (_bits_of_bytes(blocks[:, :32]) << np.uint8(2))
    return codes


def _put_q3_k(blocks: Bytes, codes: Bytes) -> None:
    _put_two_bits(blocks[:, 32:96], codes)
    _put_bits_of_bytes(blocks[:, :32], codes >> np.uint8(2))


def _scales_of_q3_k(blocks: Bytes) -> Singles:
    stored = blocks[:, 96:108]
    low = _halves_of_bytes(stored[:, :8])
    high = (stored[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    return _half(blocks, 108) * ((low | (high.reshape(-1, 16) << 4)).astype(np.float32) - 32)


def _codes_of_iq4_xs(blocks: Bytes) -> Bytes:
    packed = blocks[:, 8:].reshape(-1, 8, 16)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 256)


def _put_iq4_xs(blocks: Bytes, codes: Bytes) -> None:
    halves = codes.reshape(-1, 8, 2, 16) & 15
    blocks[:, 8:] = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(-1, 128)


def _scales_of_iq4_xs(blocks: Bytes) -> Singles:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16)
    top = (high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales: Singles = _half(blocks, 0) * ((low | (top << 4)).astype(np.float32) - 32)
    return scales


# The values of the 4-bit codes of IQ4_NL and IQ4_XS.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

# The types that can be dequantised here. All of them can be written again with their existing scales.
TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(_integers(-8, 16), _nibbles_at(2), _put_nibbles_at(2), _half_at(0)),
    "Q4_1": BlockType(_integers(0, 16), _nibbles_at(4), _put_nibbles_at(4), _half_at(0), _half_at(2)),
    "Q5_0": BlockType(_integers(-16, 32), _five_bits_at(2), _put_five_bits_at(2), _half_at(0)),
    "Q5_1": BlockType(_integers(0, 32), _five_bits_at(4), _put_five_bits_at(4), _half_at(0), _half_at(2)),
    "Q8_0": BlockType(
        np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32), _bytes_from_2, _put_bytes_from_2, _half_at(0)
    ),
    "IQ4_NL": BlockType(_IQ4, _nibbles_at(2), _put_nibbles_at(2), _half_at(0)),
    "MXFP4": BlockType(2 * np.array(E2M1, np.float32), _nibbles_at(1), _put_nibbles_at(1), _powers_of_mxfp4),
    "Q2_K": BlockType(_integers(0, 4), _codes_of_q2_k, _put_q2_k, _scales_of_q2_k, _minima_of_q2_k),
    "Q3_K": BlockType(_integers(-4, 8), _codes_of_q3_k, _put_q3_k, _scales_of_q3_k),
    "Q4_K": BlockType(_integers(0, 16), _codes_of_q4_k, _put_q4_k, _scales_of_eight, _minima_of_eight),
    "Q5_K": BlockType(_integers(0, 32), _codes_of_q5_k, _put_q5_k, _scales_of_eight, _minima_of_eight),
    "Q6_K": BlockType(_integers(-32, 64), _codes_of_q6_k, _put_q6_k, _scales_of_q6_k),
    "IQ4_XS": BlockType(_IQ4, _codes_of_iq4_xs, _put_iq4_xs, _scales_of_iq4_xs),
}
