"""Any chart as a figure of a page."""

from __future__ import annotations

from markupsafe import Markup

from loratools.charts.values import Bars, Chart, HeatMap
from loratools.pages.drawings.bars import drawn_bars
from loratools.pages.drawings.heat_map import drawn_heat_map
from loratools.pages.drawings.lines import drawn_lines


def drawn(chart: Chart) -> Markup:
    """Return the figure of a chart: its heading, the picture as SVG, and how to read it."""
    if isinstance(chart, HeatMap):
        return drawn_heat_map(chart)
    return drawn_bars(chart) if isinstance(chart, Bars) else drawn_lines(chart)
