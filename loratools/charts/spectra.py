"""Singular values of many modules as lines: by kind of module, and what ranks keep of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratools.charts.module_map import NO_LAYER, cells, column_order
from loratools.charts.values import Lines, Mark, Series

# Of the modules, at the edges of a band around the median.
_LOW, _HIGH = 0.1, 0.9
# More lines than this cannot be told apart.
_MOST_KINDS = 12
# Below this share of the largest, a singular value is rounding of any dtype.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """What is known of the singular values of one module's change.

    Attributes:
        name: The name of the module.
        singular_values: Singular values, descending; the leading ones where there are more.
        norm: The Frobenius norm of the whole change.
    """

    name: str
    singular_values: tuple[float, ...]
    norm: float

    def rank_for(self, energy: float) -> int | None:
        """Return the smallest rank that keeps this share of the squared norm.

        None if the known values do not reach it, and where there is no change.
        """
        wanted = energy * self.norm**2
        captured = 0.0
        for rank, value in enumerate(self.singular_values, start=1):
            captured += value * value
            # The norm and the sum are rounded apart.
            if value > 0 and captured >= wanted * (1 - 1e-12):
                return rank
        return None


def singular_value_lines(
    spectra: Sequence[Spectrum], *, most: int | None = None, noise_edges: Sequence[float] = ()
) -> Lines | None:
    """Return singular values over their number, each module's divided by its largest: the median of all modules with
    the middle four fifths, and the median of each kind of module. None if no module has two.

    Args:
        spectra: The singular values by module.
        most: How many of each module are shown; None for all.
        noise_edges: Of the modules where noise is known, its largest singular value divided by that of the module.
    """
    curves = {
        s.name: [value / s.singular_values[0] for value in s.singular_values[:most] if value > 0]
        for s in spectra
        if s.singular_values and s.singular_values[0] > 0
    }
    curves = {name: [value for value in curve if value > _SMALLEST] for name, curve in curves.items()}
    if max((len(curve) for curve in curves.values()), default=0) < 2:
        return None
    names = list(curves)
    by_kind: dict[str, list[Sequence[float]]] = {}
    for name, cell in zip(names, cells(names), strict=True):
        kind = re.sub(r"\d+", "*", cell.column) if cell.row == NO_LAYER else cell.column
        by_kind.setdefault(kind, []).append(curves[name])
    every = _median_series(f"all {len(curves):,} modules", list(curves.values()), band=True)
    kinds: list[Series] = []
    if 1 < len(by_kind) <= _MOST_KINDS:
        kinds = [_median_series(kind, by_kind[kind]) for kind in sorted(by_kind, key=column_order)]
    edges = sorted(edge for edge in noise_edges if edge > 0)
    marks = (Mark("rounding noise", y=edges[len(edges) // 2]),) if edges else ()
    return Lines(
        title="Singular values",
        x_label="number of the singular value",
        y_label="singular value / largest of its module",
        series=(every, *kinds),
        log_x=True,
        log_y=True,
        marks=marks,
        note="Lines are medians over modules; the band holds the middle four fifths of all modules.",
    )


def _median_series(name: str, curves: Sequence[Sequence[float]], *, band: bool = False) -> Series:
    longest = max(len(curve) for curve in curves)
    at = [sorted(curve[i] for curve in curves if len(curve) > i) for i in range(longest)]
    return Series(
        name,
        xs=tuple(float(i + 1) for i in range(longest)),
        ys=tuple(_quantile(numbers, 0.5) for numbers in at),
        low=tuple(_quantile(numbers, _LOW) for numbers in at) if band else (),
        high=tuple(_quantile(numbers, _HIGH) for numbers in at) if band else (),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of ascending numbers, between two of them in a straight line."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
