"""The kinds of charts, as frozen values of plain Python numbers.

Where there is no value there is None: a renderer leaves the place empty, and never draws a zero for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from loratools.short_repr import one_line


@dataclass(frozen=True)
class HeatMap:
    """A number for each pair of a row and a column, drawn as colours.

    Attributes:
        title: What is shown, as a heading.
        unit: What a number is, with its unit.
        rows: Labels of the rows: of layers in natural order, such as `layers.0`.
        columns: Labels of the columns, such as `q_proj`.
        values: One tuple per row with a number per column; None if there is none.
        diverging: Whether the middle of `limits` is a neutral value, from which numbers go two ways.
        limits: The numbers at the two ends of the colour scale.
        row_label: What the rows are.
        column_label: What the columns are.
        note: A sentence on how to read it; empty if the title says it all.
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
    """One line of a chart of lines, perhaps within a band.

    Attributes:
        name: Its name in the legend.
        xs: Where its points are, ascending.
        ys: The numbers at these places; None if the line is interrupted.
        low: The lower edge of the band at these places; empty if there is no band.
        high: The upper edge of the band; empty if there is no band.
        points: Whether its points are measurements of their own, which are marked.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    points: bool = False

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.ys) or any(band and len(band) != len(self.xs) for band in (self.low, self.high)):
            raise ValueError(f"the series '{self.name}' has not one number at each of its {len(self.xs)} places")

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Mark:
    """A place in a chart of lines that has a name: a straight line across.

    Attributes:
        name: What is there.
        x: Where on the horizontal axis, of a vertical line; None of a horizontal one.
        y: Where on the vertical axis, of a horizontal line; None of a vertical one.
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
    """Numbers over another number, drawn as lines.

    Attributes:
        title: What is shown, as a heading.
        x_label: What the horizontal axis is, with its unit.
        y_label: What the vertical axis is, with its unit.
        series: The lines.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        marks: Places with a name.
        percent: Whether numbers on the vertical axis are shares, which are spelled as percentages.
        note: A sentence on how to read it; empty if the title says it all.
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
    """Bars of one meaning, one for each label of the chart.

    Attributes:
        name: Their name in the legend.
        values: One number per label; None if there is none.
    """

    name: str
    values: tuple[float | None, ...]

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Bars:
    """Numbers of a few things side by side, drawn as bars from zero.

    Attributes:
        title: What is shown, as a heading.
        unit: What a number is, with its unit.
        labels: The things, such as the names of adapters.
        groups: For each meaning a bar per label.
        label: What the labels are.
        note: A sentence on how to read it; empty if the title says it all.
    """

    title: str
    unit: str
    labels: tuple[str, ...]
    groups: tuple[BarGroup, ...]
    label: str = "adapter"
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(group.values) != len(self.labels) for group in self.groups):
            raise ValueError(f"a group of bars has not one number for each of {len(self.labels)} labels")

    def __repr__(self) -> str:
        return one_line(self)


Chart: TypeAlias = HeatMap | Lines | Bars
