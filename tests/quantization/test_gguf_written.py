"""GGUF types that are written: the grid of each under its own scales, and new blocks as the gguf package has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
import pytest
from safetensors.torch import load_file

from loratools.algebra.ggml import TYPES
from loratools.algebra.ggml_quantise import quantise
from loratools.algebra.level_grid import LevelGrid
from loratools.checkpoints import open_checkpoint
from loratools.quantization.common.protocol import Fresh, PackedWeight, Writable
from loratools.storage.arrays import read_raw
from loratools.storage.gguf_reader import BLOCK_TYPES

gguf = peers.load("gguf")

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantised"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
# Sizes of a block in bytes: gguf.GGML_QUANT_SIZES, held against the package in test_gguf.py.
FRESH = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}


def weight_of(kind: str) -> PackedWeight:
    quantisation = open_checkpoint(FIXTURES / "model.gguf").quantisation
    assert quantisation is not None
    return quantisation.weights[f"{kind}.weight"]


def grid_of(weight: PackedWeight) -> LevelGrid:
    assert isinstance(weight.parameters, Writable)
    return weight.parameters.grid(weight, 0, weight.shape[0])


def test_types_that_are_taken_apart_here_are_written_and_the_others_only_read() -> None:
    quantisation = open_checkpoint(FIXTURES / "model.gguf").quantisation
    assert quantisation is not None
    kinds = {weight.parameters.format: weight.parameters for weight in quantisation.weights.values()}

    assert {kind for kind, parameters in kinds.items() if isinstance(parameters, Writable)} == set(TYPES)
    assert {kind for kind, parameters in kinds.items() if isinstance(parameters, Fresh)} == set(FRESH)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_what_is_stored_is_worth_what_the_package_dequantises_it_to(kind: str) -> None:
    np.testing.assert_array_equal(grid_of(weight_of(kind)).stored(), EXPECTED[f"gguf/{kind}.weight"].numpy())


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_unmodified_values_give_the_same_bytes(kind: str) -> None:
    weight = weight_of(kind)
    original = read_raw(weight.parts[0].tensor).reshape(-1)
    packed = original.copy()
    assert isinstance(weight.parameters, Writable)
    for start in range(0, 6, 2):
        grid = weight.parameters.grid(weight, start, start + 2)
        codes, _ = grid.codes(grid.neighbours(grid.stored()), np.zeros(grid.current.shape, bool))
        weight.parameters.pack(weight, codes, start, start + 2, packed)

    # Blocks of random bytes may have a scale that is no number; a merge refuses such a base.
    finite = np.isfinite(grid_of(weight).stored()).reshape(-1, TYPES[kind].codes(blocks_in(original, kind)).shape[1])
    same = (blocks_in(packed, kind) == blocks_in(original, kind)).all(axis=1)
    assert same[finite.all(axis=1)].all()
    assert finite.all(axis=1).sum() > len(finite) / 2


def blocks_in(packed: np.ndarray, kind: str) -> np.ndarray:
    size = next(size for name, _, size in BLOCK_TYPES.values() if name == kind)
    return packed.reshape(-1, size)


@peers.needs("gguf")
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_what_is_packed_is_dequantised_by_the_package_to_the_values_that_were_chosen(kind: str) -> None:
    weight, generator = weight_of(kind), np.random.default_rng(4)
    grid = grid_of(weight)
    found = grid.neighbours(grid.stored() * generator.uniform(0.5, 1.5, grid.current.shape).astype(np.float32))
    codes, values = grid.codes(found, generator.random(grid.current.shape) < 0.5)
    packed = read_raw(weight.parts[0].tensor).reshape(-1).copy()
    assert isinstance(weight.parameters, Writable)

    weight.parameters.pack(weight, codes, 0, 6, packed)

    theirs = gguf.quants.dequantize(packed.reshape(6, -1), gguf.GGMLQuantizationType[kind])
    finite = np.isfinite(grid.stored())
    np.testing.assert_array_equal(theirs[finite], values[finite])
    assert (theirs != grid.stored()).any()


def test_lowest_code_of_q8_0_is_not_written() -> None:
    weight = weight_of("Q8_0")
    grid = grid_of(weight)

    codes, _ = grid.codes(grid.neighbours(np.full(weight.shape, -1e9, np.float32)), np.zeros(weight.shape, bool))

    levels = codes.astype(np.uint8).view(np.int8)
    assert set(np.unique(levels[np.broadcast_to(grid.scale, weight.shape) > 0])) == {-127}


@peers.needs("gguf")
@pytest.mark.parametrize("kind", sorted(FRESH))
def test_new_blocks_are_those_of_the_package_to_the_byte(kind: str) -> None:
    generator = np.random.default_rng(7)
    values = (generator.standard_normal((300, 96)) * 10 ** generator.uniform(-6, 3, (300, 1))).astype(np.float32)
    values[:5] = 0  # a block of zeros
    values[5, :32] = 0.25  # of one value
    values[6] = np.round(values[6] * 4) / 4  # halves of a step

    ours = quantise(kind, values, FRESH[kind])

    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ours.reshape(theirs.shape), theirs)
