"""Axes: where a number lies on a picture, and which numbers stand beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_TICKS = 5
# So few powers of ten on a logarithmic axis leave room for twice and five times of them.
_FEW_POWERS = 2


@dataclass(frozen=True)
class Axis:
    """A range of numbers, laid out between two places of a picture.

    Attributes:
        low: The number at `start`.
        high: The number at `stop`.
        start: A place in pixels.
        stop: A place in pixels.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a number lies; what lies outside of the range is at its end."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (self.stop - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round numbers that are spread over the range."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < _FEW_POWERS:
                between = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
                return [tick for tick in between if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]
            return [10.0**power for power in range(first, last + 1, (last - first) // _TICKS + 1)]
        step = _round_step((self.high - self.low) / _TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Iterable[float | None], start: float, stop: float, *, log: bool = False, zero: bool = False) -> Axis:
    """Return the axis that has room for some numbers.

    Args:
        values: The numbers; what has no logarithm is no reason to extend a logarithmic axis.
        start: Where the smallest lies.
        stop: Where the largest lies.
        log: Whether it is logarithmic.
        zero: Whether 0 is on it.
    """
    known = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if zero:
        known.append(0.0)
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return Axis(low, high, start, stop, log)


def _round_step(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
