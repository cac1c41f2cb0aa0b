"""Numbers of a few things side by side, as bars from zero."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from loratools.charts.values import Bars
from loratools.pages.drawings.axes import Axis, axis
from loratools.pages.drawings.elements import clipped_label, element, group, number_text, picture, text, width_of

_WIDTH = 460.0
_BAR, _GAP = 14.0, 12.0
_LONGEST_LABEL = 48


def drawn_bars(chart: Bars) -> Markup:
    """Return the figure of a chart of bars: one line of bars for each label, and in it a bar for each meaning."""
    labels = [clipped_label(label, _LONGEST_LABEL) for label in chart.labels]
    x0 = 14 + max(map(width_of, labels), default=0)
    x1 = x0 + _WIDTH
    across = axis([v for bars in chart.groups for v in bars.values], x0, x1, zero=True)
    top = 10 + 18.0 * len(chart.groups)
    height = _BAR * len(chart.groups) + _GAP
    bottom = top + height * len(labels)
    parts = [
        *_legend([bars.name for bars in chart.groups], x0),
        *_grid(across, top, bottom),
        *(text(label, x0 - 8, top + height * (i + 0.5) + 4, anchor="end") for i, label in enumerate(labels)),
        *_bars(chart, across, top, height),
    ]
    return picture(parts, x1 + 70, bottom + 28, title=chart.title, unit=chart.unit, note=chart.note)


def _legend(names: list[str], x: float) -> Iterator[Markup]:
    for i, name in enumerate(names):
        swatch = element("rect", x=x, y=2 + 18 * i, width=12, height=12, cls=f"bar series-{i % 8}")
        yield group([swatch, text(name, x + 18, 12 + 18 * i)])


def _grid(across: Axis, top: float, bottom: float) -> Iterator[Markup]:
    for value in across.ticks():
        x = across.place(value)
        yield element("line", x1=x, x2=x, y1=top, y2=bottom, cls="grid")
        yield text(number_text(value), x, bottom + 16, anchor="middle")
    zero = across.place(0.0)
    yield element("line", x1=zero, x2=zero, y1=top, y2=bottom, cls="axis")


def _bars(chart: Bars, across: Axis, top: float, height: float) -> Iterator[Markup]:
    zero = across.place(0.0)
    for i, bars in enumerate(chart.groups):
        for j, (label, value) in enumerate(zip(chart.labels, bars.values, strict=True)):
            if value is None:
                continue
            end = across.place(value)
            y = top + height * j + _GAP / 2 + _BAR * i
            bar = element(
                "rect",
                x=min(zero, end),
                y=y,
                width=max(abs(end - zero), 1),
                height=_BAR - 2,
                cls=f"bar series-{i % 8}",
            )
            hover = element("title", f"{label}, {bars.name}: {number_text(value)}")
            yield group([hover, bar, text(number_text(value), max(zero, end) + 4, y + 10, cls="label")])
