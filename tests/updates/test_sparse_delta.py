"""A sparse delta gives what the same values in a whole matrix give, cut and transposed in any way."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.updates.parts.deltas import DenseDelta, FactorDelta, SparseDelta, sparse

SHAPE = (7, 5)
ALL = slice(None)
RANDOM = np.random.default_rng(1)
ROW = RANDOM.integers(0, SHAPE[0], 30)
COLUMN = RANDOM.integers(0, SHAPE[1], 30)
VALUES = RANDOM.standard_normal(30)


def both(added: bool) -> tuple[SparseDelta, DenseDelta]:
    factors = FactorDelta(RANDOM.standard_normal((7, 2)), RANDOM.standard_normal((2, 5))) if added else None
    whole = np.zeros(SHAPE) if factors is None else factors.b @ factors.a
    for row, column, value in zip(ROW, COLUMN, VALUES, strict=True):
        whole[row, column] += 3 * value
    return sparse(VALUES, ROW, COLUMN, SHAPE, 3, "F64", factors), DenseDelta(whole)


def test_some_places_are_the_same() -> None:
    assert len(set(zip(ROW, COLUMN, strict=True))) < len(ROW)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (ALL, ALL),
        (slice(2, 6), ALL),
        (slice(1, 7, 2), slice(0, 3)),
        (np.array([6, 0, 3]), ALL),
        (np.array([4, 5, 1]), np.array([2, 0])),
    ],
)
def test_parts_and_blocks_are_those_of_the_whole(added: bool, rows: object, columns: object) -> None:
    delta, whole = both(added)
    for found, expected in (
        (delta.part(rows, columns), whole.part(rows, columns)),
        (delta.part(rows, columns).transposed(), whole.part(rows, columns).transposed()),
        (delta.transposed().part(columns, rows), whole.transposed().part(columns, rows)),
    ):
        assert found.shape == expected.shape
        for start, stop in ((0, found.shape[0]), (1, 2)):
            block = found.rows(start, stop)
            np.testing.assert_allclose(block, expected.rows(start, stop), atol=1e-13)
            np.testing.assert_array_equal(found.rows(start, stop, out=np.full_like(block, np.nan)), block)
            assert (found.magnitude(start, stop) >= abs(block) - 1e-13).all()
