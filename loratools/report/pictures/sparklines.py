"""Lines of a chart as one row of characters each."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from loratools.charts.values import Lines
from loratools.report.text import number, safe

_HEIGHTS = "▁▂▃▄▅▆▇█"
_WIDEST = 48


class Sparklines:
    """The lines of a chart between 0 and 1, each on a row: its name, its shape, and its last number.

    Args:
        chart: The chart, with numbers from 0 to 1.
        title: What stands above the rows.
    """

    def __init__(self, chart: Lines, *, title: str) -> None:
        self.chart = chart
        self.title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        names = [safe(series.name) for series in self.chart.series]
        label_width = max(map(cell_len, names)) + 1
        room = min(_WIDEST, options.max_width - label_width - 10)
        if room < 4:
            return
        yield Text(self.title, style="bold")
        for name, series in zip(names, self.chart.series, strict=True):
            known = [value for value in series.ys if value is not None]
            places = min(len(known), room)
            # Where there are more numbers than places, each place has the first of those that it stands for.
            shown = [known[i * len(known) // places] for i in range(places)]
            bars = "".join(_HEIGHTS[min(len(_HEIGHTS) - 1, int(value * len(_HEIGHTS)))] for value in shown)
            line = Text(name + " " * (label_width - cell_len(name)), no_wrap=True)
            line.append(bars, style="cyan").append(f" {number(round(known[-1], 4))}", style="dim")
            yield line
