"""Weights that the packages themselves have quantised, read back: fixtures/quantised, made by its make.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.checkpoints import open_checkpoint
from loratools.tensors.dtypes import dtype_name

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantised"
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
EXPECTED = load_file(FIXTURES / "expected.safetensors")


def expected_of(case: str) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: values for name, values in EXPECTED.items() if name.startswith(f"{case}/")}


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal values, NaN equal to NaN; the sign of a zero does not count."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("case", CASES)
def test_values_are_to_the_bit_those_that_the_package_dequantises_to(case: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / case)
    expected = expected_of(case)

    assert checkpoint.weights.keys() == expected.keys()
    for name, values in expected.items():
        weight = checkpoint.weights[name]
        assert weight.shape == tuple(values.shape)
        assert weight.dtype == dtype_name(values.dtype)
        assert bits_equal(weight.read(), values)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 5, 7])
def test_rows_read_apart_are_the_rows_of_the_whole(case: str, rows: int) -> None:
    checkpoint = open_checkpoint(FIXTURES / case)

    for name, values in expected_of(case).items():
        weight, count = checkpoint.weights[name], values.shape[0]
        pieces = [weight.read_rows(start, min(start + rows, count)) for start in range(0, count, rows)]
        assert bits_equal(torch.cat(pieces), values)
        # From back to front, so that what is kept of the last read does no harm.
        last = [weight.read_rows(start, min(start + rows, count)) for start in reversed(range(0, count, rows))]
        assert bits_equal(torch.cat(last[::-1]), values)


@pytest.mark.parametrize("case", CASES)
def test_every_stored_tensor_belongs_to_the_one_weight_there_is(case: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / case)

    assert checkpoint.quantisation is not None
    assert not checkpoint.quantisation.refused
    assert checkpoint.weights.keys() == checkpoint.quantisation.weights.keys() == expected_of(case).keys()
    (weight,) = checkpoint.quantisation.weights.values()
    assert sorted(weight.stored_names) == sorted(checkpoint.stored)
    assert checkpoint.quantization == weight.scheme


def test_a_fixture_is_there_for_each_expected_value_and_the_other_way_round() -> None:
    assert {name.partition("/")[0] for name in EXPECTED} == {*CASES, "gguf"}
