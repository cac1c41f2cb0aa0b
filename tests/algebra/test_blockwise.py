"""What quantising makes of a weight, against bitsandbytes itself."""

from __future__ import annotations

import numpy as np
import peers
import pytest
import torch

from loratools.algebra.blockwise import block_maxima, four_bit_values, int8_values, levels, nested_scales


def weight(rows: int = 48, columns: int = 128) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    values[3] = 0
    values[-2:] *= 30
    return values


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("codes", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(codes: str) -> None:
    from bitsandbytes.functional import get_4bit_type

    theirs = np.unique(get_4bit_type(codes, device="cpu").numpy())

    np.testing.assert_array_equal(levels(codes), theirs)


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("codes", ["nf4", "fp4"])
def test_values_of_four_bits_are_to_the_bit_those_of_bitsandbytes(codes: str, blocksize: int) -> None:
    import bitsandbytes.functional as bnb

    values = weight(rows=400)
    packed, state = bnb.quantize_4bit(values, blocksize=blocksize, quant_type=codes)
    theirs = bnb.dequantize_4bit(packed, state).numpy()

    flat = values.numpy().reshape(-1)
    maxima = block_maxima(flat, blocksize)
    ours = four_bit_values(flat, codes, blocksize, maxima, maxima)

    np.testing.assert_array_equal(ours.reshape(values.shape), theirs)


@peers.needs("bitsandbytes")
def test_scales_that_are_quantised_themselves_are_the_nearest_of_the_map_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    maxima = block_maxima(weight(rows=400).numpy().reshape(-1), 64)
    table = create_dynamic_map().numpy()
    offset = torch.from_numpy(maxima).mean().numpy()
    centred = np.concatenate([maxima - offset, np.zeros(-len(maxima) % 256, np.float32)]).reshape(-1, 256)
    outer = np.abs(centred).max(axis=1, keepdims=True)
    distance = abs((centred / outer)[..., None].astype(np.float64) - table.astype(np.float64))
    expected = (table[distance.argmin(axis=-1)] * outer + offset).reshape(-1)[: len(maxima)]

    ours = nested_scales(maxima)

    np.testing.assert_array_equal(ours, expected)
    codes, state = quantize_blockwise(torch.from_numpy(maxima) - torch.from_numpy(np.asarray(offset)), blocksize=256)
    theirs = table[codes.numpy()] * np.repeat(state.absmax.numpy(), 256)[: len(maxima)] + offset
    # Its CPU kernel looks codes up in a table of 65,536 entries.
    assert (theirs == ours).mean() > 0.98


@peers.needs("bitsandbytes")
def test_values_of_int8_are_to_the_bit_those_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    values = weight()
    values = torch.cat([values[:3], values[4:]])  # of a row of zeros it divides by zero
    packed, rows, _ = bnb.int8_vectorwise_quant(values.half())

    np.testing.assert_array_equal(int8_values(values.numpy()), bnb.int8_vectorwise_dequant(packed, rows).numpy())


def test_a_row_of_zeros_stays_zero() -> None:
    assert not int8_values(np.zeros((2, 8), np.float32)).any()


def test_the_last_block_may_be_shorter() -> None:
    values = np.arange(70, dtype=np.float32)
    maxima = block_maxima(values, 64)

    seen = four_bit_values(values, "nf4", 64, maxima, maxima)

    np.testing.assert_array_equal(maxima, [63, 69])
    assert seen[-1] == 69
    assert len(seen) == 70
