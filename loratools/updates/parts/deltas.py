"""What a prepared update gives its rows from: products of factors, and products with the base's own weights.

Every delta is a matrix, (out, in) or (out, in x kernel), that can be transposed and cut, so that a kind states its
formula once, as the layer computes with it, and never how a base happens to store it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loratools.algebra.rounding import Floats

# Rows or columns of a matrix: a slice, or an array of their numbers.
Index: TypeAlias = "slice | NDArray[np.intp]"


@dataclass(frozen=True, eq=False)
class FactorDelta:
    """A delta that is a product of two thin matrices.

    `b @ a`. `b: (rows, rank)`, `a: (rank, columns)`; scale and weight are in `b`.
    """

    b: Floats
    a: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def terms(self) -> int:
        return int(self.a.shape[0])

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        import numpy as np

        return np.matmul(self.b[start:stop], self.a, out=out)

    def energy(self, start: int, stop: int) -> float:
        import numpy as np

        # |b a|^2 = <b'b, a a'>: two small squares in place of a pass over every entry.
        b = self.b[start:stop].astype(np.float64)
        return float(np.vdot(b.T @ b, self._square_of_a))

    @cached_property
    def _square_of_a(self) -> Floats:
        import numpy as np

        a = self.a.astype(np.float64)
        square: Floats = a @ a.T
        return square

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        product: Floats = abs(self.b[start:stop]) @ abs(self.a)
        return product

    def input_directions(self) -> Floats | None:
        return self.a

    def transposed(self) -> FactorDelta:
        import numpy as np

        return FactorDelta(np.ascontiguousarray(self.a.T), np.ascontiguousarray(self.b.T))

    def part(self, rows: Index, columns: Index) -> FactorDelta:
        return FactorDelta(self.b[rows], self.a[:, columns])


@dataclass(frozen=True, eq=False)
class ScaledDelta:
    """A delta that rescales rows and columns of the weight, and adds a product.

    `rows[:, None] * W + columns[None, :] * W + b @ a`: what rescales the weights themselves, row by row or column by
    column, besides adding to them. A vector that is None adds nothing; weight and scale are in all of them.
    """

    by_row: Floats | None
    by_column: Floats | None
    added: FactorDelta | None
    shape: tuple[int, int]

    @property
    def terms(self) -> int:
        return (self.added.terms if self.added is not None else 0) + 2

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        import numpy as np

        assert base is not None, "the caller has the rows that are rescaled"
        scaled = np.multiply(base, self._scales(start, stop))
        if self.added is not None:
            scaled += self.added.rows(start, stop)
        return _into(scaled, out)

    def energy(self, start: int, stop: int) -> float | None:
        return None

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        assert base is not None
        sizes: Floats = abs(base) * abs(self._scales(start, stop))
        return sizes + self.added.magnitude(start, stop) if self.added is not None else sizes

    def input_directions(self) -> Floats | None:
        return self.added.a if self.added is not None else None

    def transposed(self) -> ScaledDelta:
        added = self.added.transposed() if self.added is not None else None
        return ScaledDelta(self.by_column, self.by_row, added, self.shape[::-1])

    def part(self, rows: Index, columns: Index) -> ScaledDelta:
        by_row = self.by_row[rows] if self.by_row is not None else None
        by_column = self.by_column[columns] if self.by_column is not None else None
        added = self.added.part(rows, columns) if self.added is not None else None
        return ScaledDelta(by_row, by_column, added, _cut(self.shape, rows, columns))

    def _scales(self, start: int, stop: int) -> Any:
        total: Any = 0.0
        if self.by_row is not None:
            total = self.by_row[start:stop, None]
        if self.by_column is not None:
            total = total + self.by_column[None, :]
        return total


@dataclass(frozen=True, eq=False)
class HadamardDelta:
    """A delta that is an entrywise product.

    `W * (b @ a)` entry by entry, or `(d @ c) * (b @ a)` where there is a second product and no base is needed.
    """

    first: FactorDelta
    second: FactorDelta | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def terms(self) -> int:
        return self.first.terms + (self.second.terms if self.second is not None else 0) + 1

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        import numpy as np

        factor = self.second.rows(start, stop) if self.second is not None else base
        assert factor is not None, "the caller has the rows that are multiplied with"
        return np.multiply(self.first.rows(start, stop, out=out), factor, out=out)

    def energy(self, start: int, stop: int) -> float | None:
        return None

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        if self.second is not None:
            return self.first.magnitude(start, stop) * self.second.magnitude(start, stop)
        assert base is not None
        sizes: Floats = self.first.magnitude(start, stop) * abs(base)
        return sizes

    def input_directions(self) -> Floats | None:
        return None

    def transposed(self) -> HadamardDelta:
        return HadamardDelta(self.first.transposed(), self.second.transposed() if self.second is not None else None)

    def part(self, rows: Index, columns: Index) -> HadamardDelta:
        second = self.second.part(rows, columns) if self.second is not None else None
        return HadamardDelta(self.first.part(rows, columns), second)


@dataclass(frozen=True, eq=False)
class KroneckerDelta:
    """A delta that is a Kronecker product.

    `kron(first, second)`, whose block at (i, j) is `first[i, j] * second`; scale and weight are in `first`.
    """

    first: Floats
    second: Floats

    @property
    def shape(self) -> tuple[int, int]:
        (a, c), (b, d) = self.first.shape, self.second.shape
        return a * b, c * d

    @property
    def terms(self) -> int:
        return 1

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        import numpy as np

        return _into(self._rows(np.arange(start, stop)), out)

    def energy(self, start: int, stop: int) -> float:
        import numpy as np

        outer, inner = np.divmod(np.arange(start, stop), len(self.second))
        first, second = (np.square(w.astype(np.float64)).sum(axis=1) for w in (self.first, self.second))
        return float(np.vdot(first[outer], second[inner]))

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        sizes: Floats = abs(self.rows(start, stop))
        return sizes

    def input_directions(self) -> Floats | None:
        return None

    def transposed(self) -> KroneckerDelta:
        import numpy as np

        return KroneckerDelta(np.ascontiguousarray(self.first.T), np.ascontiguousarray(self.second.T))

    def part(self, rows: Index, columns: Index) -> DenseDelta:
        import numpy as np

        return DenseDelta(self._rows(np.arange(self.shape[0])[rows])[:, columns])

    def _rows(self, numbers: NDArray[np.intp]) -> Floats:
        import numpy as np

        outer, inner = np.divmod(numbers, len(self.second))
        blocks: Floats = self.first[outer][:, :, None] * self.second[inner][:, None, :]
        return blocks.reshape(len(numbers), -1)


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """Values at some places, besides `b @ a` where there is one. Values at the same place add; weight and scale are in
    both. Sorted by row, so that a block of rows has its values together."""

    row: NDArray[np.intp]
    column: NDArray[np.intp]
    values: Floats
    shape: tuple[int, int]
    added: FactorDelta | None = None

    @property
    def terms(self) -> int:
        return (self.added.terms if self.added is not None else 0) + 1

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        added = self.added.rows(start, stop) if self.added is not None else None
        return _into(self._spread(self.values, start, stop, added), out)

    def energy(self, start: int, stop: int) -> float | None:
        return None

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        added = self.added.magnitude(start, stop) if self.added is not None else None
        return self._spread(abs(self.values), start, stop, added)

    def input_directions(self) -> Floats | None:
        return self.added.a if self.added is not None else None

    def transposed(self) -> SparseDelta:
        added = self.added.transposed() if self.added is not None else None
        return _by_row(self.column, self.row, self.values, self.shape[::-1], added)

    def part(self, rows: Index, columns: Index) -> SparseDelta:
        row, column = _moved(self.row, self.shape[0], rows), _moved(self.column, self.shape[1], columns)
        inside = (row >= 0) & (column >= 0)
        added = self.added.part(rows, columns) if self.added is not None else None
        return _by_row(row[inside], column[inside], self.values[inside], _cut(self.shape, rows, columns), added)

    def _spread(self, values: Floats, start: int, stop: int, onto: Floats | None) -> Floats:
        import numpy as np

        spread: Floats = np.zeros((stop - start, self.shape[1]), values.dtype) if onto is None else onto
        in_rows = slice(*np.searchsorted(self.row, (start, stop)))
        np.add.at(spread, (self.row[in_rows] - start, self.column[in_rows]), values[in_rows])
        return spread


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """Values formed beforehand, in float64 and rounded to what is computed in: one whole matrix in memory."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def terms(self) -> int:
        return 1

    def rows(self, start: int, stop: int, base: Floats | None = None, *, out: Floats | None = None) -> Floats:
        return _into(self.values[start:stop], out)

    def energy(self, start: int, stop: int) -> float | None:
        return None

    def magnitude(self, start: int, stop: int, base: Floats | None = None) -> Floats:
        sizes: Floats = abs(self.values[start:stop])
        return sizes

    def input_directions(self) -> Floats | None:
        return None

    def transposed(self) -> DenseDelta:
        return DenseDelta(self.values.T)

    def part(self, rows: Index, columns: Index) -> DenseDelta:
        return DenseDelta(self.values[rows][:, columns])


def sparse(
    values: Floats,
    row: NDArray[np.intp],
    column: NDArray[np.intp],
    shape: tuple[int, int],
    weight: float,
    dtype: str,
    added: FactorDelta | None = None,
) -> SparseDelta:
    """Return a sparse delta.

    `weight * values`, of float64, at places in any order; `added` is weighted already.
    """
    import numpy as np

    kind = np.float64 if dtype == "F64" else np.float32
    return _by_row(row, column, (values * weight).astype(kind), shape, added)


def dense(values: Floats, weight: float, dtype: str) -> DenseDelta:
    """Return a dense delta.

    `weight * values`, of float64, rounded once to F32, or kept in F64.
    """
    import numpy as np

    weighted: Floats = values if weight == 1 else values * weight
    return DenseDelta(weighted.astype(np.float64 if dtype == "F64" else np.float32, copy=False))


def joined(deltas: Sequence[FactorDelta]) -> FactorDelta:
    """The sum of several, as one pair of factors: one matrix product, and one accumulation, for all adapters."""
    import numpy as np

    if len(deltas) == 1:
        return deltas[0]
    return FactorDelta(np.concatenate([d.b for d in deltas], axis=1), np.concatenate([d.a for d in deltas], axis=0))


def _by_row(
    row: NDArray[np.intp],
    column: NDArray[np.intp],
    values: Floats,
    shape: tuple[int, int],
    added: FactorDelta | None,
) -> SparseDelta:
    import numpy as np

    order = np.argsort(row, kind="stable")
    return SparseDelta(row[order], column[order], values[order], shape, added)


def _into(values: Floats, out: Floats | None) -> Floats:
    if out is None:
        return values
    out[...] = values
    return out


def _cut(shape: tuple[int, int], rows: Index, columns: Index) -> tuple[int, int]:
    return _count(shape[0], rows), _count(shape[1], columns)


def _moved(places: NDArray[np.intp], size: int, index: Index) -> NDArray[np.intp]:
    """Where places come to lie when `index` of `size` is taken; -1 for those that are left out."""
    import numpy as np

    moved = np.full(size, -1, np.intp)
    moved[index] = np.arange(_count(size, index))
    return moved[places]


def _count(size: int, index: Any) -> int:
    return len(range(*index.indices(size))) if isinstance(index, slice) else len(index)
