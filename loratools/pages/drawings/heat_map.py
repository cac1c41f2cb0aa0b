"""A number for each pair of a row and a column, as cells whose opacity says how large it is."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from loratools.charts.values import HeatMap
from loratools.pages.drawings.elements import clipped_label, element, group, number_text, picture, text, width_of

_LONGEST_LABEL = 42
# Cells with their numbers in them, and without where there are many columns.
_WIDE, _NARROW, _MOST_WIDE_COLUMNS = 74.0, 26.0, 14
_TALL, _SHORT, _MOST_TALL_ROWS = 22.0, 11.0, 48
_STEPS = 9


def drawn_heat_map(chart: HeatMap) -> Markup:
    """Return the figure of a heat map."""
    wide = len(chart.columns) <= _MOST_WIDE_COLUMNS
    width, height = _WIDE if wide else _NARROW, _TALL if len(chart.rows) <= _MOST_TALL_ROWS else _SHORT
    rows = [clipped_label(label, _LONGEST_LABEL) for label in chart.rows]
    columns = [clipped_label(label, _LONGEST_LABEL) for label in chart.columns]
    x0 = 12 + max(map(width_of, [*rows, chart.row_label]), default=0)
    slanted = any(width_of(label) > width - 6 for label in columns)
    y0 = 16 + (0.62 * max(map(width_of, columns), default=0) if slanted else 8)
    x1, y1 = x0 + width * len(columns), y0 + height * len(rows)
    overhang = 0.78 * width_of(columns[-1]) if slanted and columns else 0
    parts = [
        *(_column_label(label, x0 + width * (i + 0.5), y0 - 6, slanted) for i, label in enumerate(columns)),
        *_row_labels(rows, x0 - 6, y0, height),
        *_cells(chart, x0, y0, width, height, numbers=wide and height == _TALL),
        _scale(chart, x0, y1 + 14),
    ]
    full_width = max(x1 + overhang, x0 + 220) + 8
    return picture(parts, full_width, y1 + 50, title=chart.title, unit=chart.unit, note=chart.note)


def _column_label(label: str, x: float, y: float, slanted: bool) -> Markup:
    if not slanted:
        return text(label, x, y, anchor="middle")
    return element("text", label, transform=f"translate({x:.1f} {y:.1f}) rotate(-38)")


def _row_labels(labels: list[str], x: float, y0: float, height: float) -> Iterator[Markup]:
    # Of low rows every second has room for its label.
    step = 1 if height >= _TALL else 2
    for i in range(0, len(labels), step):
        yield text(labels[i], x, y0 + height * (i + 0.5) + 4, anchor="end")


def _cells(chart: HeatMap, x0: float, y0: float, width: float, height: float, *, numbers: bool) -> Iterator[Markup]:
    for i, (row, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        for j, (column, value) in enumerate(zip(chart.columns, values, strict=True)):
            x, y = x0 + width * j, y0 + height * i
            if value is None:
                hover = element("title", f"{row} {column}: none")
                yield element("rect", hover, x=x, y=y, width=width - 1, height=height - 1, cls="empty")
                continue
            hover = element("title", f"{row} {column}: {number_text(value)}")
            cls, opacity = shade(chart, value)
            cell = element("rect", x=x, y=y, width=width - 1, height=height - 1, cls=cls, fill_opacity=opacity)
            frame = element("rect", x=x, y=y, width=width - 1, height=height - 1, cls="cell")
            label = [text(number_text(value), x + width / 2, y + height / 2 + 4, anchor="middle")] if numbers else []
            yield group([hover, cell, frame, *label], cls="strong" if opacity > 0.6 else None)


def shade(chart: HeatMap, value: float) -> tuple[str, float]:
    """Return the class and the opacity of a value: of a diverging scale, two classes on the sides of its middle."""
    low, high = chart.limits
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    if not chart.diverging:
        return "high", round(share, 3)
    return ("high" if share >= 0.5 else "low"), round(abs(2 * share - 1), 3)


def _scale(chart: HeatMap, x: float, y: float) -> Markup:
    """The scale of colours with its two ends, and its middle where that is neutral."""
    low, high = chart.limits
    step = 20.0
    values = [low + (high - low) * i / (_STEPS - 1) for i in range(_STEPS)]
    cells = []
    for i, value in enumerate(values):
        cls, opacity = shade(chart, value)
        cells.append(element("rect", x=x + step * i, y=y, width=step, height=9, cls=cls, fill_opacity=opacity))
    frame = element("rect", x=x, y=y, width=step * _STEPS, height=9, cls="cell")
    ends = [
        text(number_text(low), x, y + 24),
        text(number_text(high), x + step * _STEPS, y + 24, anchor="end"),
    ]
    if chart.diverging:
        ends.append(text(number_text((low + high) / 2), x + step * _STEPS / 2, y + 24, anchor="middle"))
    return group([*cells, frame, *ends])
