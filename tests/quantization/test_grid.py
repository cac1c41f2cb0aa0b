"""The grids of packed weights: what their numbers can stand for, and how they are packed again.

The law: quantising the unmodified values of a weight again gives the same bytes, in every scheme that is written.
Exceptions: none, since scales stay as they are stored, and a code whose value does not change is kept (fp4, E2M1 and
float8 have two zeros).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from loratools import registry
from loratools.algebra.level_grid import LevelGrid
from loratools.checkpoints import open_checkpoint
from loratools.quantization.common.protocol import PackedWeight, Writable
from loratools.storage.arrays import read_raw

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantised"
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
EXPECTED = load_file(FIXTURES / "expected.safetensors")
# Their scales, or their order, do not allow a number to be written on its own, or no client is known that reads it.
ONLY_READ = ("hqq", "quanto", "torchao")
WRITTEN = [case for case in CASES if not case.startswith(ONLY_READ)]


def weight_of(case: str) -> PackedWeight:
    quantisation = open_checkpoint(FIXTURES / case).quantisation
    assert quantisation is not None
    (weight,) = quantisation.weights.values()
    return weight


def expected_of(case: str) -> np.ndarray:
    (values,) = (v for name, v in EXPECTED.items() if name.startswith(f"{case}/"))
    return values.float().numpy()


def grid_of(weight: PackedWeight) -> LevelGrid:
    assert isinstance(weight.parameters, Writable)
    return weight.parameters.grid(weight, 0, weight.shape[0])


@pytest.mark.parametrize("case", CASES)
def test_which_schemes_are_written_and_which_are_only_read(case: str) -> None:
    assert isinstance(weight_of(case).parameters, Writable) == (case in WRITTEN)


def test_every_scheme_that_is_written_has_a_fixture() -> None:
    schemes = {weight_of(case).scheme for case in WRITTEN}

    # GPTQ is held by tests with arithmetic written out, GGUF in test_gguf_written.py.
    writable = {
        name
        for name in registry.names("quantization")
        if any(
            isinstance(member, type) and hasattr(member, "pack")
            for member in vars(registry.load("quantization", name)).values()
        )
    }
    assert writable - schemes <= {"gguf", "gptq"}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_stored_is_worth_what_the_package_dequantises_it_to(case: str) -> None:
    stored = grid_of(weight_of(case)).stored()

    np.testing.assert_array_equal(stored, expected_of(case))


@pytest.mark.parametrize("rows", [None, 32])
@pytest.mark.parametrize("case", WRITTEN)
def test_the_unmodified_values_give_the_same_bytes(case: str, rows: int | None) -> None:
    weight = weight_of(case)
    original = np.ascontiguousarray(read_raw(weight.parts[0].tensor)).reshape(-1).view(np.uint8)
    packed = np.zeros_like(original)
    assert isinstance(weight.parameters, Writable)
    count = weight.shape[0]
    for start in range(0, count, rows or count):
        stop = min(start + (rows or count), count)
        grid = weight.parameters.grid(weight, start, stop)
        found = grid.neighbours(expected_of(case)[start:stop])
        for upper in (np.zeros(grid.current.shape, bool), np.ones(grid.current.shape, bool)):
            codes, values = grid.codes(found, upper)
            np.testing.assert_array_equal(values, grid.stored())
        weight.parameters.pack(weight, codes, start, stop, packed)

    np.testing.assert_array_equal(packed, original)


@pytest.mark.parametrize("case", WRITTEN)
def test_neighbours_are_the_nearest_of_all_values_below_and_above(case: str) -> None:
    weight, rng = weight_of(case), np.random.default_rng(5)
    grid = grid_of(weight)
    every = np.stack([grid.worth(np.full(grid.current.shape, grid.values[c], np.float32)) for c in grid.allowed])
    lowest, highest = every.min(axis=0), every.max(axis=0)
    exact = lowest + (highest - lowest) * rng.uniform(-0.02, 1.02, lowest.shape).astype(np.float32)

    found = grid.neighbours(exact)

    below = np.where(every <= exact, every, -np.inf).max(axis=0)
    above = np.where(every >= exact, every, np.inf).min(axis=0)
    np.testing.assert_array_equal(found.low, np.where(np.isinf(below), lowest, below))
    np.testing.assert_array_equal(found.high, np.where(np.isinf(above), highest, above))


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_packed_is_dequantised_to_the_values_that_were_chosen(case: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from loratools.storage.arrays import ArraySource
    from loratools.tensors.lazy import LazyTensor

    weight, rng = weight_of(case), np.random.default_rng(6)
    assert isinstance(weight.parameters, Writable)
    grid = grid_of(weight)
    found = grid.neighbours(grid.stored() * rng.uniform(0.5, 1.5, grid.current.shape).astype(np.float32))
    codes, values = grid.codes(found, rng.random(grid.current.shape) < 0.5)
    first = weight.parts[0]
    packed = np.zeros(first.tensor.nbytes, np.uint8)

    weight.parameters.pack(weight, codes, 0, weight.shape[0], packed)

    tensor = LazyTensor(first.tensor.shape, first.tensor.dtype, ArraySource(packed))
    written = replace(weight, parts=(first._replace(tensor=tensor), *weight.parts[1:]))
    np.testing.assert_array_equal(written.parameters.dequantise(written, 0, weight.shape[0]), values)


@pytest.mark.parametrize("upper", [False, True])
def test_a_stored_code_that_is_not_written_anew_stays_where_nothing_moves_its_value(upper: bool) -> None:
    """Signed bytes of which -128 is not written: two values of 0.5 times -128, one of which is moved by a little."""
    levels = np.arange(-128, 128).astype(np.float32)
    current = np.array([[0, 0, 5]], np.uint8)
    grid = LevelGrid(levels, np.arange(1, 256), current, np.full((1, 3), 0.5, np.float32), "F32")

    neighbours = grid.neighbours(np.array([[-64.0, -63.9, -61.5]], np.float32))
    codes, values = grid.codes(neighbours, np.full(current.shape, upper))

    assert codes.tolist() == [[0, 1, 5]]
    assert values.tolist() == [[-64.0, -63.5, -61.5]]


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("case", WRITTEN)
def test_what_surely_stays_is_nearest_to_what_is_stored(case: str, size: float) -> None:
    weight, rng = weight_of(case), np.random.default_rng(7)
    grid = grid_of(weight)
    every = np.stack([grid.worth(np.full(grid.current.shape, grid.values[c], np.float32)) for c in grid.allowed])
    stored = grid.stored()
    step = np.sort(np.abs(every - stored), axis=0)[1:].astype(np.float64)
    smallest = np.where(step > 0, step, np.inf).min(axis=0)
    moved = (size * smallest * rng.uniform(-1, 1, stored.shape)).astype(np.float32)

    may_leave = grid.may_leave(stored, moved)

    exact = stored + moved
    nearest = np.abs(every.astype(np.float64) - exact).min(axis=0)
    stays = nearest == np.abs(stored.astype(np.float64) - exact)
    assert not (~may_leave & ~stays).any()
    if size == 0.01 and len(grid.allowed) <= 16:
        assert may_leave.mean() < 0.2  # most of a small update is decided at a glance


@pytest.mark.parametrize("case", WRITTEN)
def test_some_values_of_a_grid_have_the_neighbours_that_they_have_in_all_of_it(case: str) -> None:
    weight, rng = weight_of(case), np.random.default_rng(8)
    grid = grid_of(weight)
    exact = grid.stored() * rng.uniform(0.5, 1.5, grid.current.shape).astype(np.float32)
    places = rng.random(grid.current.shape) < 0.3

    some, every = grid.at(places).neighbours(exact[places]), grid.neighbours(exact)

    for one, other in zip(some, every, strict=True):
        np.testing.assert_array_equal(one, other[places])
