"""How the sums of a merge are brought onto the grid that they are stored on: one choice for each weight of the base.

`nearest` needs none of this. The other modes choose between the two neighbours of each sum
(`algebra/neighbours.py`): `stochastic` by random numbers that belong to the weight's name and place, `adapter` so that
the error is small for the inputs that the adapters read, `calibrated` so that it is small for measured inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Delta

if TYPE_CHECKING:
    from loratools.algebra.neighbours import InputMetric, Mask
    from loratools.algebra.rounding import Floats

RoundingMode: TypeAlias = Literal["nearest", "stochastic", "adapter", "calibrated"]

# Errors are fed back over the inputs of many outputs side by side: fewer would spend their time on calls.
_LEAST_ROWS = 512
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Rounding:
    """How the sums of one weight are rounded.

    Attributes:
        mode: Which of the two neighbours is taken.
        seed: Of the random numbers of `stochastic`.
        penalty: Of `adapter` and `calibrated`: what an error costs that meets none of the inputs that are cared for.
        moments: Of `calibrated`: sums of x x' over the inputs of the weight, (inputs, inputs).
    """

    mode: RoundingMode = "nearest"
    seed: int = 0
    penalty: float = 0.0
    moments: LazyTensor | None = None

    @property
    def feeds_back(self) -> bool:
        """Whether errors are carried from input to input."""
        return self.mode in ("adapter", "calibrated")

    def block_rows(self, columns: int) -> int:
        """Rows that are rounded together where errors are fed back."""
        return max(_LEAST_ROWS, _BLOCK_ELEMENTS // max(1, columns))


NEAREST = Rounding()
# What is cared for is an orthonormal basis (adapter) or inputs of mean square 1 (calibrated). The first was measured on
# real adapters (docs/rounding.md), the second was chosen.
_PENALTIES = {"adapter": 0.25, "calibrated": 0.01}
# On the grids of quantised weights, whose steps are far larger than an update: the first as measured by
# benchmarks/quantised.py.
_PENALTIES_PACKED = {"adapter": 0.1, "calibrated": 0.01}


def default_penalty(mode: RoundingMode, *, packed: bool = False) -> float:
    """The penalty where the caller gives none; `packed`: of weights that are quantised again."""
    return (_PENALTIES_PACKED if packed else _PENALTIES).get(mode, 0.0)


class PlacedDelta(Protocol):
    """A delta in its place in the matrix of an output: rows start:stop, and some columns."""

    @property
    def delta(self) -> Delta: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def columns(self) -> slice: ...


class Chooser(Protocol):
    """Chooses between the neighbours of sums."""

    @property
    def undirected(self) -> int:
        """How many sums were rounded to nearest, as nothing is known of the inputs that their updates read."""

    def __call__(self, start: int, exact: Floats, low: Floats, high: Floats) -> Mask:
        """Where the upper neighbour is taken, for rows from `start` on; blocks come in the order of the rows."""


def chooser(
    rounding: Rounding,
    name: str,
    matrix: tuple[int, int],
    deltas: Sequence[PlacedDelta],
    *,
    inputs_along_rows: bool,
) -> Chooser:
    """What chooses for the weight of that name, which is merged as a matrix of these rows and columns."""
    if rounding.mode == "stochastic":
        return _Stochastic(f"{rounding.seed} {name}", matrix[1])
    if inputs_along_rows:
        return _FeedbackAlongRows(rounding, matrix, deltas)
    return _FeedbackAlongColumns(rounding, matrix, deltas)


@dataclass(frozen=True)
class _Stochastic:
    key: str
    columns: int
    undirected: int = 0

    def __call__(self, start: int, exact: Floats, low: Floats, high: Floats) -> Mask:
        from loratools.algebra.neighbours import random_fractions, stochastic_choice

        drawn = random_fractions(self.key, start * self.columns, exact.size).reshape(exact.shape)
        return stochastic_choice(exact, low, high, drawn)


class _Feedback(ABC):
    """Errors of a weight are fed back from input to input, run by run of rows that the same deltas cover."""

    def __init__(self, rounding: Rounding, matrix: tuple[int, int], deltas: Sequence[PlacedDelta]) -> None:
        self.rounding = rounding
        self.columns = matrix[1]
        self.deltas = deltas
        self.measured = _measured(rounding)
        self.undirected = 0

    def __call__(self, start: int, exact: Floats, low: Floats, high: Floats) -> Mask:
        import numpy as np

        upper = np.empty(exact.shape, np.bool_)
        for first, last in _segments(self.deltas, start, start + len(exact)):
            rows = slice(first - start, last - start)
            below, above = _errors(exact[rows], low[rows], high[rows])
            choice = self.choice(first, last, below, above)
            if choice is None:
                self.undirected += below.size
            upper[rows] = _nearer(below, above) if choice is None else choice
        return upper

    @abstractmethod
    def choice(self, start: int, stop: int, below: Floats, above: Floats) -> Mask | None:
        """Where the upper neighbour is taken in rows start:stop, given the errors of both neighbours.

        None if nothing is known of the inputs, and the nearest number is the best.
        """


class _FeedbackAlongColumns(_Feedback):
    """A row of the stored matrix is one output: all inputs of a block of rows are at hand."""

    def __init__(self, rounding: Rounding, matrix: tuple[int, int], deltas: Sequence[PlacedDelta]) -> None:
        super().__init__(rounding, matrix, deltas)
        self.bases: dict[tuple[int, ...], Floats | None] = {}

    def choice(self, start: int, stop: int, below: Floats, above: Floats) -> Mask | None:
        import numpy as np

        from loratools.algebra.neighbours import feedback_choice

        metric = _metric(self.rounding, self._basis(start, stop), self.measured, stop - start)
        if metric is None:
            return None
        upper: Mask = feedback_choice(0, np.ascontiguousarray(below.T), np.ascontiguousarray(above.T), metric).T
        return upper

    def _basis(self, start: int, stop: int) -> Floats | None:
        """An orthonormal basis of the inputs that the deltas of these rows read."""
        covering = tuple(i for i, d in enumerate(self.deltas) if d.start <= start and stop <= d.stop)
        if covering not in self.bases:
            deltas = [self.deltas[i] for i in covering]
            pairs = [(d.delta.input_directions(), d.columns) for d in deltas]
            self.bases[covering] = _basis(pairs, self.columns)
        return self.bases[covering]


class _FeedbackAlongRows(_Feedback):
    """A column of the stored matrix is one output: errors are carried from block to block of the rows."""

    def __init__(self, rounding: Rounding, matrix: tuple[int, int], deltas: Sequence[PlacedDelta]) -> None:
        super().__init__(rounding, matrix, deltas)
        # Of several experts, one below the other, each has inputs of its own.
        self.areas = sorted({(d.start, d.stop) for d in deltas})
        self.metrics: dict[tuple[int, int], InputMetric | None] = {}

    def choice(self, start: int, stop: int, below: Floats, above: Floats) -> Mask | None:
        from loratools.algebra.neighbours import feedback_choice

        area = next(((a, b) for a, b in self.areas if a <= start and stop <= b), None)
        metric = self._of(area) if area is not None else None
        if area is None or metric is None:
            return None
        return feedback_choice(start - area[0], below, above, metric)

    def _of(self, area: tuple[int, int]) -> InputMetric | None:
        if area not in self.metrics:
            deltas = [d for d in self.deltas if (d.start, d.stop) == area]
            pairs = [(d.delta.transposed().input_directions(), slice(None)) for d in deltas]
            basis = _basis(pairs, area[1] - area[0])
            # The experts before it are done with.
            self.metrics = {area: _metric(self.rounding, basis, self.measured, self.columns)}
        return self.metrics[area]


def _measured(rounding: Rounding) -> Floats | None:
    from loratools.algebra.neighbours import with_unit_mean
    from loratools.storage.arrays import read_array

    return with_unit_mean(read_array(rounding.moments, "F32")) if rounding.moments is not None else None


def _metric(rounding: Rounding, basis: Floats | None, measured: Floats | None, outputs: int) -> InputMetric | None:
    """What errors cost; None if nothing is known of the inputs, and the nearest number is the best."""
    from loratools.algebra.neighbours import MeasuredMetric, SubspaceMetric

    if measured is not None:
        return MeasuredMetric(measured, rounding.penalty, outputs)
    return SubspaceMetric(basis, rounding.penalty, outputs) if basis is not None and len(basis) else None


def _basis(directions: Sequence[tuple[Floats | None, slice]], inputs: int) -> Floats | None:
    """An orthonormal basis of all directions, each given for some of the inputs; None if there are none."""
    import numpy as np

    from loratools.algebra.neighbours import orthonormal_rows

    spread = []
    for rows, columns in directions:
        if rows is not None:
            wide = np.zeros((len(rows), inputs), rows.dtype)
            wide[:, columns] = rows
            spread.append(wide)
    return orthonormal_rows(np.concatenate(spread)) if spread else None


def _segments(deltas: Sequence[PlacedDelta], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start:stop in runs that the same deltas cover."""
    edges = {edge for d in deltas for edge in (d.start, d.stop) if start < edge < stop}
    bounds = [start, *sorted(edges), stop]
    return pairwise(bounds)


def _errors(exact: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """The errors of the neighbours, in float32."""
    import numpy as np

    return (low - exact).astype(np.float32, copy=False), (high - exact).astype(np.float32, copy=False)


def _nearer(below: Floats, above: Floats) -> Mask:
    upper: Mask = above < -below
    return upper
