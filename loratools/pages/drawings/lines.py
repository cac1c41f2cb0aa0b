"""Numbers over another number, as lines with bands and named places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from markupsafe import Markup

from loratools.charts.values import Lines, Series
from loratools.pages.drawings.axes import Axis, axis
from loratools.pages.drawings.elements import clipped_label, element, group, number_text, picture, text, width_of

_WIDTH, _HEIGHT = 560.0, 300.0
_LEFT_MARGIN, _TOP, _BOTTOM = 76.0, 14.0, 46.0
_LONGEST_NAME = 36
# Places to hover over; more of them would make the page large and lie on each other.
_MOST_PLACES = 3_000


def drawn_lines(chart: Lines) -> Markup:
    """Return the figure of a chart of lines."""
    x1, y1 = _LEFT_MARGIN + _WIDTH, _TOP + _HEIGHT
    xs = [x for series in chart.series for x in series.xs] + [m.x for m in chart.marks if m.x is not None]
    ys = [y for series in chart.series for y in (*series.ys, *series.low, *series.high)]
    ys += [mark.y for mark in chart.marks if mark.y is not None]
    across = axis(xs, _LEFT_MARGIN, x1, log=chart.log_x)
    upward = axis(ys, y1, _TOP, log=chart.log_y)
    names = [clipped_label(series.name, _LONGEST_NAME) for series in chart.series]
    parts = [
        *_frame(chart, across, upward),
        *(_band(series, i, across, upward) for i, series in enumerate(chart.series) if series.low and series.high),
        *(line for i, series in enumerate(chart.series) for line in _line(series, i, across, upward)),
        *_marks(chart, across, upward),
        *_places(chart, across, upward),
        *_legend(names, x1 + 16, _TOP + 8),
    ]
    width = x1 + 16 + (40 + max(map(width_of, names), default=0))
    return picture(parts, width, y1 + _BOTTOM, title=chart.title, unit=chart.y_label, note=chart.note)


def _frame(chart: Lines, across: Axis, upward: Axis) -> Iterator[Markup]:
    bottom = upward.start
    for value in upward.ticks():
        y = upward.place(value)
        yield element("line", x1=across.start, x2=across.stop, y1=y, y2=y, cls="grid")
        yield text(number_text(value, percent=chart.percent), across.start - 8, y + 4, anchor="end")
    for value in across.ticks():
        x = across.place(value)
        yield element("line", x1=x, x2=x, y1=bottom, y2=bottom + 5, cls="axis")
        yield text(number_text(value), x, bottom + 19, anchor="middle")
    yield element("line", x1=across.start, x2=across.stop, y1=bottom, y2=bottom, cls="axis")
    yield element("line", x1=across.start, x2=across.start, y1=bottom, y2=upward.stop, cls="axis")
    yield text(chart.x_label, (across.start + across.stop) / 2, bottom + 38, anchor="middle", cls="label")


def _band(series: Series, i: int, across: Axis, upward: Axis) -> Markup:
    edges = [*zip(series.xs, series.high, strict=True), *reversed([*zip(series.xs, series.low, strict=True)])]
    points = " ".join(f"{across.place(x):.1f},{upward.place(y):.1f}" for x, y in edges)
    return element("polygon", points=points, cls=f"band series-{i % 8}")


def _line(series: Series, i: int, across: Axis, upward: Axis) -> Iterator[Markup]:
    """The line, in pieces where it is interrupted."""
    drawable = [
        None if y is None or not math.isfinite(y) or (upward.log and y <= 0) else (across.place(x), upward.place(y))
        for x, y in zip(series.xs, series.ys, strict=True)
    ]
    for is_gap, run in groupby(drawable, lambda point: point is None):
        if not is_gap:
            points = [point for point in run if point is not None]
            yield element(
                "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), cls=f"line series-{i % 8}"
            )


def _marks(chart: Lines, across: Axis, upward: Axis) -> Iterator[Markup]:
    for mark in chart.marks:
        if mark.x is not None:
            x = across.place(mark.x)
            yield element("line", x1=x, x2=x, y1=upward.start, y2=upward.stop, cls="mark")
            yield text(mark.name, x - 5, upward.start - 8, anchor="end", cls="label")
        elif mark.y is not None:
            y = upward.place(mark.y)
            yield element("line", x1=across.start, x2=across.stop, y1=y, y2=y, cls="mark")
            yield text(mark.name, across.stop - 4, y - 5, anchor="end", cls="label")


def _places(chart: Lines, across: Axis, upward: Axis) -> Iterator[Markup]:
    """A circle for each number, which is seen where it is a measurement of its own, and has the number on hover."""
    count = sum(len(series.xs) for series in chart.series)
    step = max(1, math.ceil(count / _MOST_PLACES))
    for i, series in enumerate(chart.series):
        for x, y in [*zip(series.xs, series.ys, strict=True)][:: 1 if series.points else step]:
            if y is None or not math.isfinite(y) or (upward.log and y <= 0):
                continue
            hover = f"{series.name}, {chart.x_label} {number_text(x)}: {number_text(y, percent=chart.percent)}"
            yield element(
                "circle",
                element("title", hover),
                cx=across.place(x),
                cy=upward.place(y),
                r=3.5 if series.points else 6,
                cls=f"point series-{i % 8}" if series.points else "place",
            )


def _legend(names: list[str], x: float, y: float) -> Iterator[Markup]:
    for i, name in enumerate(names):
        line = element("line", x1=x, x2=x + 26, y1=y + 18 * i, y2=y + 18 * i, cls=f"line series-{i % 8}")
        yield group([line, text(name, x + 32, y + 18 * i + 4)])
