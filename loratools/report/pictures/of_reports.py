"""The pictures that verbs print below their numbers, each where it says what the numbers do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.charts.values import Chart, HeatMap, Lines
from loratools.report.pictures.heat_map import LayerMap
from loratools.report.pictures.on_terminal import OnTerminal
from loratools.report.pictures.sparklines import Sparklines

# An error, and a gain's distance from the weight, below which a map of them shows rounding.
LEAST_ERROR, LEAST_LOSS = 1e-4, 0.01


def maps(charts: Callable[[], Sequence[Chart]], *titles: str) -> OnTerminal:
    """Return the maps with these titles, and the lines of singular values by kind of module, for a terminal.

    Args:
        charts: What makes the charts; it is called on a terminal alone.
        titles: The beginnings of the titles of the maps to show, and `Singular values`.
    """

    def blocks() -> Iterable[RenderableType]:
        by_title = {chart.title: chart for chart in charts()}
        for wanted in titles:
            for title, chart in by_title.items():
                if not title.startswith(wanted):
                    continue
                match chart:
                    case HeatMap() if chart.has_layers:
                        yield from (Text(), LayerMap(chart))
                    case Lines():
                        yield from (Text(), Sparklines(chart, title="Singular values / largest, by kind of module"))

    return OnTerminal(blocks)
