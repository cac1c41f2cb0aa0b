"""Charts as a matplotlib figure: for papers and for notebooks.

Readable without colour: the colour scale of a map is even in lightness, places below a neutral value are hatched,
lines differ in their dashes and bars in their hatching. The figure does not depend on a person's settings of
matplotlib, so that the same charts give the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from loratools.charts.notebook_figure import NotebookFigure
from loratools.charts.numbers import aligned
from loratools.charts.sections import Section, sections
from loratools.charts.values import Bars, Chart, HeatMap, Lines, Series
from loratools.short_repr import clipped, printable

# Two columns of a page of a paper, in inches; a chart takes one of them or both.
_WIDTH = 7.2
_HALF = _WIDTH / 2
# Okabe and Ito's colours, which people with any kind of colour blindness tell apart, dark enough on white.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES: tuple[object, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "////", "....", "xxxx")
_FILLS = ("#0072b2", "#e69f00", "#d9d9d9", "#56b4e9")
_SEQUENTIAL, _DIVERGING = "cividis", "PuOr"
# Labels of heat maps and bars are clipped at this number of characters.
_LONGEST_LABEL = 44
# The width of a number in a cell of a heat map, in inches.
_NUMBER_WIDTH = 0.27
# More ticks than this on an axis are thinned out.
_MOST_TICKS = 32
_TEXT_SIZE = 7.0
# Of a text in the default font: the mean width of a character as a share of its size in points.
_CHARACTER = 0.6
_SETTINGS: dict[str, Any] = {
    "axes.edgecolor": "0.3",
    "axes.labelsize": _TEXT_SIZE,
    "axes.linewidth": 0.6,
    "figure.dpi": 150,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": _TEXT_SIZE,
    "hatch.linewidth": 0.5,
    "legend.fontsize": _TEXT_SIZE,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    # Type 42 and "none": text stays text in PDF and SVG.
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "loratools",
    # Names come from files: a dollar sign in one begins no formula.
    "text.parse_math": False,
    "xtick.labelsize": _TEXT_SIZE,
    "xtick.major.width": 0.6,
    "ytick.labelsize": _TEXT_SIZE,
    "ytick.major.width": 0.6,
}


@contextmanager
def fixed_settings() -> Iterator[None]:
    """The settings that a figure is drawn and written with, whatever a person's own are."""
    with matplotlib.style.context(["default", _SETTINGS]):
        yield


def figure_of(charts: Sequence[Chart], *, title: str = "") -> Figure:
    """Return a figure with a panel for each chart, in one or two columns.

    Args:
        charts: The charts, at least one.
        title: What stands above all panels; nothing where it is empty.
    """
    with fixed_settings():
        rows = list(_rows([_Panel.of(chart) for chart in charts]))
        heights = [max(panel.height for panel in row) for row in rows]
        extra = max(0.0, *(panel.extra_width for row in rows for panel in row))
        figure = NotebookFigure(
            figsize=(_WIDTH + extra, sum(heights) + (0.3 if title else 0.0)),
            layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, hspace=0.02),
        )
        if title:
            figure.suptitle(clipped(printable(title), 100), fontsize=9, x=0.01, ha="left")
        # Every panel is laid out on its own: the long names of one take no room from those above and below it.
        grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
        for i, row in enumerate(rows):
            for j, panel in enumerate(row):
                part = figure.add_subfigure(grid[i, :] if panel.wide else grid[i, j])
                _draw(part.add_subplot(), panel.chart, panel)
    return figure


# ── where panels stand ──


@dataclass(frozen=True)
class _Panel:
    """A chart and its size in inches. `extra_width`: what its labels need beyond the usual."""

    chart: Chart
    wide: bool
    height: float
    extra_width: float = 0.0

    @classmethod
    def of(cls, chart: Chart) -> _Panel:
        match chart:
            case Lines():
                names = _line_names(chart)
                legend = 0.14 * math.ceil(len(names) / _legend_columns(names)) if len(names) > 1 else 0.0
                return cls(chart, False, 2.4 + legend + _heading_height(chart, _WIDTH / 2))
            case Bars():
                labels = _inches(max(map(len, _clipped(chart.labels)), default=0))
                bars = len(chart.labels) * (0.1 + 0.15 * len(chart.groups))
                wide = len(chart.labels) > 4 or labels > 1.6
                height = 0.8 + bars + _heading_height(chart, _WIDTH if wide else _WIDTH / 2)
                return cls(chart, wide, height, max(0.0, labels - 2.2))
            case HeatMap():
                across, down = _oriented(chart)
                label_width = _inches(max(map(len, _clipped(down))))
                wide = len(across) > 12 or label_width > 1.4 or (not chart.has_layers and len(across) > 5)
                cell = 0.19 if chart.has_layers else 0.3
                names_below = 0.35 if chart.has_layers and len(sections(chart.rows)) == 1 else 0.9
                heading = _heading_height(chart, _WIDTH if wide else _WIDTH / 2)
                height = 0.35 + heading + names_below + cell * len(down)
                # With more layers than this, cells would be too thin to see.
                more = max(0.0, label_width + 0.9 + 0.055 * len(across) - _WIDTH) if wide else 0.0
                return cls(chart, wide, max(1.7, height), more)


def _rows(panels: Sequence[_Panel]) -> Iterator[tuple[_Panel, ...]]:
    """Panels one below the other, two beside each other where both are narrow."""
    waiting: _Panel | None = None
    for panel in panels:
        if panel.wide:
            if waiting is not None:
                yield (waiting,)
                waiting = None
            yield (panel,)
        elif waiting is None:
            waiting = panel
        else:
            yield waiting, panel
            waiting = None
    if waiting is not None:
        # Lines that are alone in their row take all of it; a map would only grow wide places.
        yield (replace(waiting, wide=isinstance(waiting.chart, Lines)),)


def _inches(characters: float) -> float:
    return characters * _CHARACTER * _TEXT_SIZE / 72


def _clipped(labels: Sequence[str]) -> list[str]:
    return [clipped(printable(label), _LONGEST_LABEL) for label in labels]


# ── panels ──


def _draw(axes: Axes, chart: Chart, panel: _Panel) -> None:
    width = _WIDTH + panel.extra_width if panel.wide else (_WIDTH + panel.extra_width) / 2
    notes = [chart.note]
    match chart:
        case HeatMap():
            per_cell = (width - _label_width(chart) - 0.75) / len(_oriented(chart)[0])
            notes += _draw_map(axes, chart, per_cell)
        case Lines():
            _draw_lines(axes, chart)
        case Bars():
            _draw_bars(axes, chart)
    _entitle(axes, *_heading(chart.title, " ".join(filter(None, notes)), width - _label_width(chart) - 0.2))


def _label_width(chart: Chart) -> float:
    """What stands to the left of a panel, in inches."""
    match chart:
        case HeatMap():
            return _inches(max(map(len, _names_down(chart)))) + 0.2
        case Bars():
            return _inches(max(map(len, _clipped(chart.labels)), default=0))
        case _:
            return 0.6


def _heading(title: str, note: str, width: float) -> tuple[list[str], list[str]]:
    """The lines of a panel's title and of how to read it; `width` in inches is what they may take."""
    title_lines = textwrap.wrap(printable(title), max(16, int(width / _inches(1.3))))
    return title_lines, textwrap.wrap(printable(note), max(20, int(width / _inches(0.86))))


def _heading_height(chart: Chart, width: float) -> float:
    """The height of a panel's heading in inches, for a panel of this width."""
    # A line more for what drawing finds out: which places have no value.
    note = f"{chart.note} Crossed: no value." if isinstance(chart, HeatMap) else chart.note
    title_lines, lines = _heading(chart.title, note, width - _label_width(chart) - 0.2)
    return 0.14 * len(title_lines) + 0.1 * len(lines) + 0.1


def _entitle(axes: Axes, title_lines: Sequence[str], lines: Sequence[str]) -> None:
    """The title of a panel, and below it in small how to read it."""
    pad = 8 + 7.2 * len(lines) if lines else 5
    axes.set_title("\n".join(title_lines), loc="left", fontsize=8, weight="bold", pad=pad, va="bottom")
    if lines:
        axes.annotate(
            "\n".join(lines),
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=6,
            color="0.35",
            va="bottom",
        )


def _oriented(chart: HeatMap) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels across and those down: layers stand across, as there are more of them than kinds of modules."""
    return (chart.rows, chart.columns) if chart.has_layers else (chart.columns, chart.rows)


def _draw_map(axes: Axes, chart: HeatMap, per_cell: float) -> list[str]:
    """Draw the map with cells of the given width in inches, and return the entries of its legend."""
    across, down = _oriented(chart)
    values = list(zip(*chart.values, strict=True)) if chart.has_layers else list(chart.values)
    numbers = [[math.nan if value is None else value for value in row] for row in values]
    low, high = chart.limits
    colours = matplotlib.colormaps[_DIVERGING if chart.diverging else _SEQUENTIAL]
    small = len(across) * len(down) <= 20_000
    mesh = axes.pcolormesh(
        numbers,
        cmap=colours,
        vmin=low,
        vmax=high,
        edgecolors="white" if len(across) < 100 and small else "none",
        linewidth=0.3,
        rasterized=not small,
    )
    axes.set_xlim(0, len(across))
    axes.set_ylim(len(down), 0)
    # What has no value shows the crossed ground.
    axes.patch.set(facecolor="white", hatch="xxxxxx", edgecolor="0.8", linewidth=0)
    notes = ["Crossed: no value."] if any(value is None for row in values for value in row) else []
    neutral = (low + high) / 2
    if per_cell >= _NUMBER_WIDTH:
        _write_numbers(axes, numbers, colours, chart.limits)
    elif chart.diverging and any(value < neutral for row in numbers for value in row):
        notes.append(f"Hatched: below {neutral:g}.")
        _hatch_below(axes, numbers, neutral)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.015, aspect=18)
    bar.set_label("\n".join(textwrap.wrap(printable(chart.unit), 26)))
    bar.outline.set_linewidth(0.4)
    axes.set_yticks([i + 0.5 for i in range(len(down))], _names_down(chart))
    axes.tick_params(length=0)
    axes.set_ylabel(chart.column_label if chart.has_layers else chart.row_label)
    if chart.has_layers:
        _label_layers(axes, chart, per_cell)
    else:
        _label_columns(axes, chart)
    return notes


def _names_down(chart: HeatMap) -> list[str]:
    names = _clipped(_oriented(chart)[1])
    return names if chart.has_layers else [f"{name}  {i}" for i, name in enumerate(names, start=1)]


def _label_columns(axes: Axes, chart: HeatMap) -> None:
    """Numbers in place of names, which stand with the same numbers beside the rows where these are the same."""
    same = chart.rows == chart.columns
    names = [str(i) for i in range(1, len(chart.columns) + 1)] if same else _clipped(chart.columns)
    axes.set_xticks(
        [i + 0.5 for i in range(len(names))],
        names,
        rotation=0 if same else 40,
        ha="center" if same else "right",
    )
    axes.set_xlabel(f"{chart.column_label}, by the numbers on the left" if same else chart.column_label)


def _label_layers(axes: Axes, chart: HeatMap, per_cell: float) -> None:
    parts = sections(chart.rows)
    in_layers = [section for section in parts if section.labels != ("",)]
    if len(in_layers) == 1:
        section = in_layers[0]
        step = _step(len(section.labels), max(map(len, section.labels)), per_cell)
        places = range(section.start, section.stop, step)
        ticks = [(i + 0.5, section.labels[i - section.start]) for i in places]
        # The words of such a name stand below each other, as a place may be no wider than a number.
        ticks += [(part.start + 0.5, part.name.replace(" ", "\n")) for part in parts if part is not section]
        axes.set_xticks(
            [place for place, _ in ticks], ["\n".join(map(printable, label.split("\n"))) for _, label in ticks]
        )
        named = section.name in ("layer", "layers")
        axes.set_xlabel(chart.row_label if named else f"{chart.row_label} ({printable(section.name)})")
        return
    for section in parts[1:]:
        axes.axvline(section.start, color="black", linewidth=0.9)
    axes.set_xticks(
        [(section.start + section.stop) / 2 for section in parts],
        [_section_name(section) for section in parts],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_xlabel(chart.row_label)


def _section_name(section: Section) -> str:
    name = clipped(printable(section.name), _LONGEST_LABEL)
    return f"{name} ({len(section.labels)})" if len(section.labels) > 1 else name


def _step(count: int, characters: int, per_cell: float) -> int:
    """Every how many layers there is a tick, so that labels do not run into each other."""
    least = max(count / _MOST_TICKS, _inches(characters + 1) / per_cell)
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500, 1000, 10**9) if step >= least)


def _write_numbers(
    axes: Axes, numbers: Sequence[Sequence[float]], colours: Colormap, limits: tuple[float, float]
) -> None:
    spelled = aligned(numbers, limits)
    for y, row in enumerate(numbers):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            red, green, blue, _ = colours((value - limits[0]) / (limits[1] - limits[0]))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                x + 0.5,
                y + 0.5,
                spelled[y][x],
                ha="center",
                va="center",
                fontsize=6,
                color="black" if light else "white",
            )


def _hatch_below(axes: Axes, numbers: Sequence[Sequence[float]], neutral: float) -> None:
    places = [
        [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
        for y, row in enumerate(numbers)
        for x, value in enumerate(row)
        if value < neutral
    ]
    axes.add_collection(PolyCollection(places, hatch="/////", facecolor="none", edgecolor="0.15", linewidth=0))


def _draw_lines(axes: Axes, chart: Lines) -> None:
    handles = []
    for i, series in enumerate(chart.series):
        colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
        if series.low:
            axes.fill_between(series.xs, series.low, series.high, color="0.85", linewidth=0)
        (line,) = axes.plot(
            series.xs,
            [math.nan if y is None else y for y in series.ys],
            color=colour,
            linestyle=dashes,
            linewidth=1.6 if series.low else 1.0,
            marker=_MARKERS[i % len(_MARKERS)] if series.points else None,
            markersize=3,
        )
        handles.append(line)
    names = _line_names(chart)
    for mark in chart.marks:
        style: dict[str, Any] = {"color": "0.45", "linewidth": 0.9, "linestyle": (0, (1, 1))}
        handles += [axes.axvline(mark.x, **style)] if mark.x is not None else []
        handles += [axes.axhline(mark.y, **style)] if mark.y is not None else []
    if chart.log_x:
        axes.set_xscale("log", base=2)
        _plain_ticks(axes, chart.series)
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if chart.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.set_ylim(bottom=0)
    axes.set_xlabel(printable(chart.x_label))
    axes.set_ylabel("\n".join(textwrap.wrap(printable(chart.y_label), 40)))
    axes.grid(True, which="major", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(handles) > 1:
        # Below the axis and its label, whatever their height; within the axes it would cover lines.
        axes.figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=_legend_columns(names),
            handlelength=3.2,
            labelspacing=0.3,
        )


def _line_names(chart: Lines) -> list[str]:
    """What the legend says of the lines and then of the marks."""
    names = [clipped(printable(series.name), _LONGEST_LABEL) for series in chart.series]
    return names + [printable(mark.name) for mark in chart.marks]


def _legend_columns(names: Sequence[str]) -> int:
    return 1 if len(names) < 4 or max(map(len, names)) > 24 else 2


def _plain_ticks(axes: Axes, series: Sequence[Series]) -> None:
    """Ticks at powers of two, written out: ranks and counts are such numbers."""
    longest = max(max(each.xs) for each in series)
    powers = [2**i for i in range(math.floor(math.log2(longest)) + 1)] if longest >= 1 else [longest]
    axes.xaxis.set_major_locator(FixedLocator(powers))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_bars(axes: Axes, chart: Bars) -> None:
    names = _clipped(chart.labels)
    thickness = 0.8 / max(1, len(chart.groups))
    largest = max((abs(value) for group in chart.groups for value in group.values if value is not None), default=1.0)
    handles: list[Rectangle] = []
    for g, group in enumerate(chart.groups):
        middle = [i - 0.4 + (g + 0.5) * thickness for i in range(len(names))]
        bars = axes.barh(
            middle,
            [0.0 if value is None else value for value in group.values],
            height=thickness * 0.92,
            color=_FILLS[g % len(_FILLS)],
            hatch=_HATCHES[g % len(_HATCHES)],
            edgecolor="black",
            linewidth=0.5,
        )
        handles += bars.patches[:1]
        for y, value in zip(middle, group.values, strict=True):
            text = "no value" if value is None else f"{value:.3g}"
            axes.annotate(
                text,
                (0.0 if value is None else max(value, 0.0), y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color="0.4" if value is None else "black",
            )
    axes.axvline(0, color="0.3", linewidth=0.6)
    axes.set_xlim(right=largest * 1.18 or 1.0)
    # Few enough for numbers with three decimals to stand beside each other.
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(printable(chart.unit))
    axes.grid(True, axis="x", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(handles) > 1:
        axes.figure.legend(
            handles, [group.name for group in chart.groups], loc="outside lower center", ncols=len(handles)
        )
