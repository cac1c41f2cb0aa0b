"""A heat map in a terminal: layers across, kinds of modules down, as wide as there is room.

Where not all layers have room side by side, the map is cut into bands that stand below each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from loratools.charts.numbers import aligned
from loratools.charts.sections import Section, sections
from loratools.charts.values import HeatMap
from loratools.report.pictures.on_terminal import has_colours
from loratools.report.pictures.shades import character, characters, shade
from loratools.report.text import safe

# The largest number of columns for a layer: more are not clearer.
_WIDEST = 3
# Columns of the scale in the legend.
_SCALE = 18
# A map of more lines than this scrolls what matters off the screen.
_MOST_LINES = 32
_MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class LayerMap:
    """A heat map of layers and kinds of modules; nothing where it would need more lines than a screen has.

    Args:
        chart: The map, whose rows are layers.
    """

    def __init__(self, chart: HeatMap) -> None:
        self.chart = chart

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        chart = self.chart
        names = [safe(name) for name in chart.columns]
        label_width = max(map(cell_len, [*names, chart.row_label])) + 1
        room = options.max_width - label_width
        parts = sections(chart.rows)
        bands = _bands(parts, room)
        if room < 8 or len(bands) * (len(names) + 2) > _MOST_LINES:
            return
        colours = has_colours(console)
        yield Text(safe(chart.title), style="bold")
        width = max(1, min(_WIDEST, min((room - _separators(band)) // _layers(band) for band in bands)))
        marks = _marks(parts, width)
        for band in bands:
            for position, name in enumerate(names):
                line = Text(name + " " * (label_width - cell_len(name)), no_wrap=True)
                for section in band:
                    if section is not band[0]:
                        line.append("|" if section.start else "", style="dim")
                    for layer in range(section.start, section.stop):
                        self._append(line, chart.values[layer][position], width, colours)
                yield line
            yield _axis(band, marks, label_width, width)
        yield from _legend(chart, colours, options.max_width)
        if marks:
            yield Text(_explained(marks), style="dim")

    def _append(self, line: Text, value: float | None, width: int, colours: bool) -> None:
        chart = self.chart
        if value is None:
            line.append(" " * width)
        elif colours:
            line.append(" " * width, style=shade(value, chart.limits, diverging=chart.diverging))
        else:
            sign = character(value, chart.limits, diverging=chart.diverging)
            line.append((sign * max(1, width - 1)).ljust(width))


class AdapterMatrix:
    """A matrix of adapters with its numbers in coloured places.

    Args:
        chart: The matrix, whose rows and columns are the same adapters.
        otherwise: What is shown where there are no colours, or no room.
    """

    def __init__(self, chart: HeatMap, otherwise: RenderableType) -> None:
        self.chart = chart
        self.otherwise = otherwise

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        chart = self.chart
        numbers = aligned(chart.values, chart.limits)
        width = max(4, *(len(number) for row in numbers for number in row)) + 2
        label_width = len(str(len(chart.rows))) + 2
        if not has_colours(console) or label_width + width * len(chart.columns) > options.max_width:
            yield self.otherwise
            return
        heads = "".join(f"{i + 1:^{width}}" for i in range(len(chart.columns)))
        yield Text(" " * label_width + heads, style="dim", no_wrap=True)
        for i, (row, values) in enumerate(zip(numbers, chart.values, strict=True)):
            line = Text(f"{i + 1:>{label_width - 1}} ", style="dim", no_wrap=True)
            for number, value in zip(row, values, strict=True):
                style = shade(value, chart.limits, diverging=chart.diverging) if value is not None else ""
                line.append(f"{number:^{width}}" if value is not None else f"{'·':^{width}}", style=style)
            yield line


def _bands(parts: Sequence[Section], room: int) -> list[list[Section]]:
    """The sections by bands that have room for their layers; a section with too many layers is cut."""
    bands: list[list[Section]] = [[]]
    for section in parts:
        for piece in _pieces(section, room):
            if bands[-1] and _layers(bands[-1]) + len(bands[-1]) + len(piece.labels) > room:
                bands.append([])
            bands[-1].append(piece)
    return bands


def _pieces(section: Section, room: int) -> Iterator[Section]:
    count = -(-len(section.labels) // max(1, room))
    size = -(-len(section.labels) // count)
    for start in range(0, len(section.labels), size):
        yield Section(section.name, section.start + start, section.labels[start : start + size])


def _layers(band: Sequence[Section]) -> int:
    return sum(len(section.labels) for section in band)


def _separators(band: Sequence[Section]) -> int:
    return len(band) - 1


def _marks(parts: Sequence[Section], width: int) -> dict[str, str]:
    """A letter for each section where not all names have room below their layers; empty if they have."""
    if len(parts) == 1 or all(cell_len(safe(part.name)) < len(part.labels) * width + 1 for part in parts):
        return {}
    names = list(dict.fromkeys(safe(part.name) for part in parts))
    return {name: _MARKS[i] if i < len(_MARKS) else str(i + 1) for i, name in enumerate(names)}


def _axis(band: Sequence[Section], marks: dict[str, str], label_width: int, width: int) -> Text:
    """The line below a band: numbers of layers where there is one section, else the names or letters of sections."""
    cells = [" "] * (_layers(band) * width + _separators(band) + 8)
    place = 0
    one_section = len(band) == 1 and not marks
    for section in band:
        if one_section:
            step = max(1, -(-(max(map(len, section.labels)) + 1) // width))
            step = next(each for each in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, 10**9) if each >= step)
            for i in range(0, len(section.labels), step):
                cells[i * width : i * width + len(section.labels[i])] = section.labels[i]
        else:
            name = safe(section.name)
            name = marks.get(name, name)
            cells[place : place + len(name)] = name
        place += len(section.labels) * width + 1
    label = "layer".ljust(label_width)
    return Text((label + "".join(cells)).rstrip(), style="dim", no_wrap=True)


def _legend(chart: HeatMap, colours: bool, max_width: int) -> Iterator[Text]:
    """The scale with its numbers, and what they are."""
    low, high = (f"{limit:.3g}" for limit in chart.limits)
    scale = Text(f"{low} ")
    if colours:
        for i in range(_SCALE):
            value = chart.limits[0] + (chart.limits[1] - chart.limits[0]) * i / (_SCALE - 1)
            scale.append(" ", style=shade(value, chart.limits, diverging=chart.diverging))
    else:
        scale.append(characters(diverging=chart.diverging))
    scale.append(f" {high}  {safe(chart.unit)}")
    if any(value is None for row in chart.values for value in row):
        scale.append("; blank: no value", style="dim")
    yield scale


def _explained(marks: dict[str, str]) -> str:
    return ", ".join(f"{mark} {name}" for name, mark in marks.items())
