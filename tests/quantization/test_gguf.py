"""The block types of ggml, against the package gguf: its file in fixtures/quantised, and random blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from safetensors.torch import load_file

from loratools.algebra.ggml import TYPES
from loratools.checkpoints import open_checkpoint
from loratools.storage.gguf_reader import BLOCK_TYPES

gguf = peers.load("gguf")

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantised"
EXPECTED = {
    name.removeprefix("gguf/"): values
    for name, values in load_file(FIXTURES / "expected.safetensors").items()
    if name.startswith("gguf/")
}
# What these tests can read without the package.
OURS = sorted(name for name in EXPECTED if name.removesuffix(".weight") in (*TYPES, "F32", "F16", "BF16"))


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9))


def test_every_type_of_the_fixture_is_a_weight_by_its_logical_shape() -> None:
    checkpoint = open_checkpoint(FIXTURES / "model.gguf")

    assert checkpoint.layout == "gguf"
    assert {name: weight.shape for name, weight in checkpoint.weights.items()} == dict.fromkeys(EXPECTED, (6, 512))
    assert checkpoint.quantisation is not None
    assert not checkpoint.quantisation.refused


@pytest.mark.parametrize("name", OURS)
def test_common_types_are_unpacked_to_the_bit_without_the_package(name: str) -> None:
    weight = open_checkpoint(FIXTURES / "model.gguf").weights[name]

    assert equal(weight.read().float(), EXPECTED[name])
    assert equal(torch.cat([weight.read_rows(i, i + 1) for i in range(6)]).float(), EXPECTED[name])


@peers.needs("gguf")
@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - set(OURS)))
def test_rarer_types_are_unpacked_by_the_package(name: str) -> None:
    weight = open_checkpoint(FIXTURES / "model.gguf").weights[name]

    assert equal(weight.read(), EXPECTED[name])


@peers.needs("gguf")
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_random_blocks_are_worth_what_the_package_says(kind: str) -> None:
    wanted = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[wanted]
    blocks = np.random.default_rng(5).integers(0, 256, (400, size), dtype=np.uint8)

    with np.errstate(all="ignore"):
        ours, theirs = TYPES[kind].decode(blocks.copy()), gguf.quants.dequantize(blocks, wanted)

    assert ours.dtype == np.float32
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_codes_that_are_put_into_blocks_are_read_back_and_leave_the_scales(kind: str) -> None:
    size = next(size for name, _, size in BLOCK_TYPES.values() if name == kind)
    generator = np.random.default_rng(6)
    before = generator.integers(0, 256, (50, size), dtype=np.uint8)
    after = before.copy()
    codes = generator.integers(0, len(TYPES[kind].levels), TYPES[kind].codes(before).shape, dtype=np.uint8)

    TYPES[kind].store_codes(after, TYPES[kind].codes(before))
    assert np.array_equal(after, before)
    TYPES[kind].store_codes(after, codes)

    assert np.array_equal(TYPES[kind].codes(after), codes)
    assert np.array_equal(TYPES[kind].scales(after), TYPES[kind].scales(before), equal_nan=True)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_rows_of_any_type_are_no_values(name: str) -> None:
    weight = open_checkpoint(FIXTURES / "model.gguf").weights[name]

    assert weight.read_rows(2, 2).shape == (0, 512)


@peers.needs("gguf")
def test_block_sizes_are_those_of_the_package() -> None:
    plain = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
    theirs = {
        kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items() if kind.name not in plain
    }

    assert theirs == BLOCK_TYPES


@peers.needs("gguf")
def test_every_type_that_the_package_dequantises_is_in_the_fixture() -> None:
    theirs = {f"{kind.name}.weight" for kind in gguf.quants._type_traits}

    assert theirs <= EXPECTED.keys()


def test_q4_k_is_two_scales_and_eight_of_six_bits_by_the_written_formula() -> None:
    """One block by hand: d 0.5, dmin 0.25, scales 1 to 8, minima 9 to 16, codes 0 to 15 again and again."""
    scales, minima = np.arange(1, 9), np.arange(9, 17)
    packed = np.zeros(12, np.uint8)
    packed[:4] = scales[:4] | ((scales[4:] >> 4) << 6)
    packed[4:8] = minima[:4] | ((minima[4:] >> 4) << 6)
    packed[8:] = (scales[4:] & 15) | ((minima[4:] & 15) << 4)
    codes = np.arange(256).reshape(4, 2, 32) % 16
    nibbles = (codes[:, 0] | (codes[:, 1] << 4)).astype(np.uint8)
    header = np.array([0.5, 0.25], np.float16).view(np.uint8)
    block = np.concatenate([header, packed, nibbles.reshape(-1)])[None]

    expected = 0.5 * scales[:, None] * codes.reshape(8, 32) - 0.25 * minima[:, None]

    assert np.array_equal(TYPES["Q4_K"].decode(block).reshape(8, 32), expected)
