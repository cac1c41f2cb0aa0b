"""The kinds of charts, as frozen values of plain Python numbers.

A missing value is None. A renderer leaves its place empty, and never draws a zero for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from loratools.short_repr import one_line


@dataclass(frozen=True)
class HeatMap:
    """A number for each pair of a row and a column, drawn as colours.

    Attributes:
        title: The heading: what is shown.
        unit: What the numbers are, with their unit.
        rows: Labels of the rows: of layers in natural order, such as `layers.0`.
        columns: Labels of the columns, such as `q_proj`.
        values: One tuple per row with a number per column; None for a missing number.
        diverging: Whether the middle of `limits` is a neutral value, with a colour for each direction.
        limits: The numbers at both ends of the colour scale.
        row_label: What the rows are.
        column_label: What the columns are.
        note: How to read the chart, as a sentence; empty if the title is enough.
    """

    title: str
    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    diverging: bool = False
    limits: tuple[float, float] = (0.0, 1.0)
    row_label: str = "layer"
    column_label: str = "module"
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"the values are not {len(self.rows)} rows of {len(self.columns)} numbers")
        if not self.limits[0] < self.limits[1]:
            raise ValueError(f"the limits {self.limits} are not in ascending order")

    @property
    def has_layers(self) -> bool:
        """Whether the rows are layers of a model, whose labels end with numbers."""
        return self.row_label == "layer"

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Series:
    """One line of a chart of lines, optionally with a band around it.

    Attributes:
        name: Its name in the legend.
        xs: The x coordinates of its points, ascending.
        ys: The y coordinates of its points; None interrupts the line.
        low: The lower edge of the band at each x; empty if there is no band.
        high: The upper edge of the band at each x; empty if there is no band.
        points: Whether the points are individual measurements and get markers.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    points: bool = False

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.ys) or any(band and len(band) != len(self.xs) for band in (self.low, self.high)):
            raise ValueError(f"the series '{self.name}' needs one number at each of its {len(self.xs)} places")

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Mark:
    """A named straight line across a chart of lines.

    Attributes:
        name: Its name.
        x: The x coordinate of a vertical line; None for a horizontal one.
        y: The y coordinate of a horizontal line; None for a vertical one.
    """

    name: str
    x: float | None = None
    y: float | None = None

    def __post_init__(self) -> None:
        if (self.x is None) == (self.y is None):
            raise ValueError(f"the mark '{self.name}' needs one of x and y")

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Lines:
    """Numbers that depend on another number, drawn as lines.

    Attributes:
        title: The heading: what is shown.
        x_label: What the horizontal axis is, with its unit.
        y_label: What the vertical axis is, with its unit.
        series: The lines.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        marks: Named straight lines across the chart.
        percent: Whether the numbers on the vertical axis are shares, which are printed as percentages.
        note: How to read the chart, as a sentence; empty if the title is enough.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    marks: tuple[Mark, ...] = ()
    percent: bool = False
    note: str = ""

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class BarGroup:
    """One series of bars, with one bar for each label of the chart.

    Attributes:
        name: Their name in the legend.
        values: One number per label; None for a missing number.
    """

    name: str
    values: tuple[float | None, ...]

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Bars:
    """Numbers for a few labels, drawn as bars from zero.

    Attributes:
        title: The heading: what is shown.
        unit: What the numbers are, with their unit.
        labels: The labels, such as the names of adapters.
        groups: The series of bars, each with a bar per label.
        label: What the labels are.
        note: How to read the chart, as a sentence; empty if the title is enough.
    """

    title: str
    unit: str
    labels: tuple[str, ...]
    groups: tuple[BarGroup, ...]
    label: str = "adapter"
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(group.values) != len(self.labels) for group in self.groups):
            raise ValueError(f"a group of bars needs one number for each of {len(self.labels)} labels")

    def __repr__(self) -> str:
        return one_line(self)


Chart: TypeAlias = HeatMap | Lines | Bars
