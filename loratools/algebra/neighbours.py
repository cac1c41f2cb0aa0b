"""Rounding a number to one of the two neighbours that it lies between, if the nearer one is not always better.

Rounding to nearest loses updates that are small compared with the spacing of the grid. It loses them everywhere in the
same way: the base's weights lie on the grid, so nothing dithers them. Two other rules keep the update:

    stochastic   the upper neighbour with the probability (x - low) / (high - low), so that the expected value is x
    feedback     one input at a time, the neighbour that makes the output error smallest for given inputs, with what was
                 chosen for the inputs before it

Feedback greedily minimises, for each output separately, `e H e'` over the errors e of the weights of that output, with
H the second moments of the inputs: either `V V' + penalty I`, where the columns of V are an orthonormal basis of the
directions that matter, or measured ones. It is the greedy path-following quantisation of Lybrand and Saab (JMLR 22:156,
2021).

Plain numpy. Every result is one of the two neighbours.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loratools.algebra.rounding import Floats, rounded_to_odd

Mask = NDArray[np.bool_]

# How many inputs are decided one after the other before the products with all earlier errors are computed anew.
_INPUTS = 16
_RANDOM_BITS = 24
# Directions shorter than this share of the longest are numerical noise.
_SHORTEST = 1e-7


def float_neighbours(values: Floats, dtype: str) -> tuple[Floats, Floats]:
    """The BF16 or F16 numbers next to the values, below and above; both are the value itself if it is representable.

    Values are finite and within the range of the dtype. Results have the dtype of the values.
    """
    if dtype == "F16":
        nearest = values.astype(np.float16)
        wide = nearest.astype(values.dtype)
        with np.errstate(over="ignore"):
            above = np.nextafter(nearest, np.float16(np.inf)).astype(values.dtype)
            below = np.nextafter(nearest, np.float16(-np.inf)).astype(values.dtype)
        return np.where(wide > values, below, wide), np.where(wide < values, above, wide)
    single = values if values.dtype == np.float32 else rounded_to_odd(values)
    bits = single.view(np.uint32)
    towards_zero = bits & np.uint32(0xFFFF0000)
    beyond = towards_zero + (np.uint32(0x10000) * ((bits & np.uint32(0xFFFF)) != 0).astype(np.uint32))
    inner, outer = towards_zero.view(np.float32), beyond.view(np.float32)
    low, high = np.minimum(inner, outer), np.maximum(inner, outer)
    return low.astype(values.dtype, copy=False), high.astype(values.dtype, copy=False)


def random_fractions(key: str, first: int, count: int) -> NDArray[np.float32]:
    """Uniform random numbers in [0, 1), multiples of 2 ** -24, for the elements first to first + count of a tensor.

    They depend only on the key and on the index of the element, so that blocks of any size give the same numbers.

    Args:
        key: What the numbers are for, including the seed.
        first: The index of the first element, in stored order.
        count: How many numbers.
    """
    words = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], np.uint64)
    generator = np.random.Philox(key=words)
    # One step of the counter gives four 64-bit words, which are eight numbers.
    skipped = first % 8
    generator.advance(first // 8)
    drawn = generator.random_raw(-(-(skipped + count) // 2)).astype("<u8").view("<u4")[skipped : skipped + count]
    fractions: NDArray[np.float32] = (drawn >> (32 - _RANDOM_BITS)).astype(np.float32) * np.float32(2**-_RANDOM_BITS)
    return fractions


def stochastic_choice(values: Floats, low: Floats, high: Floats, random: Floats) -> Mask:
    """Where the upper neighbour is taken, given uniform random numbers in [0, 1)."""
    step = high - low
    chosen: Mask = (random * step) < (values - low)
    return chosen


def orthonormal_rows(directions: Floats) -> Floats:
    """An orthonormal basis of the space that the rows span: (k, inputs) -> (rank, inputs), in float32."""
    _, sizes, basis = np.linalg.svd(directions.astype(np.float64), full_matrices=False)
    spanning = basis[sizes > _SHORTEST * sizes[0]] if len(sizes) and sizes[0] > 0 else basis[:0]
    return spanning.astype(np.float32)


class InputMetric(Protocol):
    """The cost of errors: products of second moments of inputs with the errors that were made so far.

    Inputs come in order from the first. Outputs are the columns of every matrix of errors.
    """

    def moments(self, start: int, stop: int) -> Floats:
        """The square start:stop of H, (stop - start, stop - start), with the penalty on its diagonal."""

    def pull(self, start: int, stop: int) -> Floats:
        """Rows start:stop of H times all errors before `start`: (stop - start, outputs)."""

    def absorb(self, start: int, stop: int, errors: Floats) -> None:
        """Record the errors of the inputs start:stop: (stop - start, outputs)."""


class SubspaceMetric:
    """An error metric that is large in a few directions.

    `H = V V' + penalty I` for a few directions. Only `V' e`, (rank, outputs), is kept of the errors.

    Args:
        basis: Orthonormal rows, (rank, inputs).
        penalty: Weight of the error itself, relative to the error in those directions.
        outputs: How many outputs are rounded together.
    """

    def __init__(self, basis: Floats, penalty: float, outputs: int) -> None:
        self.basis = basis
        self.penalty = np.float32(penalty)
        self.carried: Floats = np.zeros((len(basis), outputs), np.float32)

    def moments(self, start: int, stop: int) -> Floats:
        part = self.basis[:, start:stop]
        square: Floats = part.T @ part
        square[np.diag_indices_from(square)] += self.penalty
        return square

    def pull(self, start: int, stop: int) -> Floats:
        product: Floats = self.basis[:, start:stop].T @ self.carried
        return product

    def absorb(self, start: int, stop: int, errors: Floats) -> None:
        self.carried += self.basis[:, start:stop] @ errors


def with_unit_mean(moments: Floats) -> Floats:
    """Second moments divided by the mean of their diagonal, as for inputs with a mean square of 1."""
    mean = float(np.trace(moments, dtype=np.float64)) / max(1, len(moments))
    return moments / np.float32(mean) if mean > 0 else moments


class MeasuredMetric:
    """An error metric measured on inputs.

    `H` as measured, plus the penalty. All errors are kept.

    Args:
        measured: Second moments with a mean diagonal of 1, (inputs, inputs), in float32.
        penalty: Weight of the error itself.
        outputs: How many outputs are rounded together.
    """

    def __init__(self, measured: Floats, penalty: float, outputs: int) -> None:
        self.measured = measured
        self.penalty = np.float32(penalty)
        self.errors: Floats = np.zeros((len(measured), outputs), np.float32)

    def moments(self, start: int, stop: int) -> Floats:
        square: Floats = self.measured[start:stop, start:stop].copy()
        square[np.diag_indices_from(square)] += self.penalty
        return square

    def pull(self, start: int, stop: int) -> Floats:
        product: Floats = self.measured[start:stop, :start] @ self.errors[:start]
        return product

    def absorb(self, start: int, stop: int, errors: Floats) -> None:
        self.errors[start:stop] = errors


def feedback_choice(first: int, low_error: Floats, high_error: Floats, metric: InputMetric) -> Mask:
    """Where the upper neighbour is taken, for inputs from `first` on: (inputs, outputs).

    For each value, the neighbour with the smaller `e^2 h + 2 e p` is taken, where e is its error, h the diagonal of H,
    and p the product of H with the errors of all earlier inputs. This is its contribution to `e H e'`. The choice is
    recorded in the metric.

    Args:
        first: The index of the first of these inputs.
        low_error: `low - x`, (inputs, outputs), in float32; not above zero.
        high_error: `high - x`, (inputs, outputs), in float32; not below zero.
        metric: The metric, which has the errors of the inputs before `first`.
    """
    upper: Mask = np.empty(low_error.shape, np.bool_)
    for start in range(0, len(low_error), _INPUTS):
        stop = min(start + _INPUTS, len(low_error))
        moments = metric.moments(first + start, first + stop)
        product = metric.pull(first + start, first + stop)
        # The upper neighbour costs less where p + h (low + high) / 2 < 0.
        threshold = (low_error[start:stop] + high_error[start:stop]) * (np.float32(-0.5) * np.diag(moments)[:, None])
        errors: Floats = np.empty_like(product)
        for i in range(stop - start):
            np.less(product[i], threshold[i], out=upper[start + i])
            errors[i] = np.where(upper[start + i], high_error[start + i], low_error[start + i])
            product[i + 1 :] += moments[i + 1 :, i, None] * errors[i]
        metric.absorb(first + start, first + stop, errors)
    return upper
