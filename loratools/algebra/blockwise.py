"""Quantisation of a weight as bitsandbytes does it, and its dequantised values: NF4 and FP4 in blocks, and LLM.int8().

    4 bit   absmax[j] = max |W| of block j          q = the code nearest to W / absmax          W' = map[q] * absmax
    nested  absmax - mean(absmax) is quantised to bytes in blocks of 256, by a map of its own, and dequantised again
    int8    SCB[o] = max |W| of row o, of W in float16          q = round(W * 127 / SCB)         W' = q * SCB / 127

Blocks run over the flattened weight. Everything is in float32, as in bitsandbytes. Its CPU kernel quantises scales with
a table of 65,536 entries, and so takes the second nearest code if two are almost equally near. Its GPU kernels take the
nearest code, and so does this file.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from loratools.algebra.rounding import Floats

Singles = NDArray[np.float32]

# QLoRA (Dettmers et al., 2023), appendix E: quantiles of the normal distribution, scaled to -1 and 1.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Twelfths: a float of three bits of exponent and mantissa, and its sign.
_FP4_TWELFTHS = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_SMALLEST = np.float32(1e-38)
_NESTED_BLOCK = 256
# bitsandbytes multiplies by this constant instead of dividing by 127.
_PER_STEP = np.float32(7.874015718698502e-3)


@cache
def levels(codes: str) -> Singles:
    """The values of nf4 or fp4, in increasing order."""
    if codes == "nf4":
        return np.array(_NF4, np.float32)
    positive = np.array(_FP4_TWELFTHS, np.float32) / np.float32(12)
    return np.concatenate([-positive[:0:-1], positive])


def block_maxima(values: Floats, blocksize: int) -> Singles:
    """The largest magnitude in each block of a flat array. The last block may be shorter."""
    padded = np.zeros(-(-len(values) // blocksize) * blocksize, np.float32)
    padded[: len(values)] = np.abs(values)
    largest: Singles = padded.reshape(-1, blocksize).max(axis=1)
    return largest


def four_bit_values(values: Floats, codes: str, blocksize: int, maxima: Singles, scales: Singles) -> Singles:
    """The dequantised 4-bit values of whole blocks of a flat array. The last block may be shorter.

    Args:
        values: Float32 values, starting at the beginning of a block.
        codes: nf4 or fp4.
        blocksize: Number of values in a block.
        maxima: The largest magnitude of each block, by which values are divided.
        scales: The scales that codes are multiplied by: the maxima, or their values after nested quantisation.
    """
    return _nearest(values, levels(codes), blocksize, maxima) * np.repeat(scales, blocksize)[: len(values)]


def _nearest(values: Floats, table: Singles, blocksize: int, maxima: Singles) -> Singles:
    """For each value divided by the maximum of its block, the nearest entry of a table of values from -1 to 1."""
    middles = (table[1:] + table[:-1]) / np.float32(2)
    inverse = np.repeat(np.float32(1) / np.maximum(maxima, _SMALLEST), blocksize)[: len(values)]
    nearest: Singles = table[np.searchsorted(middles, np.clip(values * inverse, -1, 1), side="left")]
    return nearest


def nested_scales(maxima: Singles) -> Singles:
    """The values of the maxima of all blocks of one weight after double quantisation."""
    import torch

    # torch's mean, because its order of additions decides the last bits.
    offset = np.float32(torch.from_numpy(maxima).mean().item())
    centred = maxima - offset
    outer = block_maxima(centred, _NESTED_BLOCK)
    chosen = _nearest(centred, _dynamic_map(), _NESTED_BLOCK, outer)
    scales: Singles = chosen * np.repeat(outer, _NESTED_BLOCK)[: len(centred)] + offset
    return scales


@cache
def _dynamic_map() -> Singles:
    """The 256 values of the dynamic map (Dettmers, 2015). There are seven decades down from 1; each has twice as many
    values as the next lower one, evenly spaced from a tenth of its upper end on, with both signs. In addition there are
    0 and 1.
    """
    import torch

    values: list[float] = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        decade = (10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*decade.tolist(), *(-decade).tolist()]
    return np.array(sorted(values), np.float32)


def int8_values(values: Floats) -> Singles:
    """The dequantised values of rows after LLM.int8(): (rows, columns), in float32."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16).astype(np.float32)
    largest = np.abs(halves).max(axis=1, keepdims=True, initial=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # As torch divides a number by a tensor.
        steps = np.rint(halves * (np.float32(1) / largest * np.float32(127)))
    dequantised: Singles = np.where(largest > 0, steps, 0).astype(np.float32) * largest * _PER_STEP
    return dequantised
