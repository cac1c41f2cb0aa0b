"""Methods that reports with pictures share: their charts, and a figure of these.

A report knows nothing of who builds its charts: the builder is asked for by name, and only when somebody asks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loratools.charts.pictures import Pictures
    from loratools.charts.values import Chart


def report_charts(self: object) -> tuple[Chart, ...]:
    """Return the charts of the report as plain values; see `loratools.charts`."""
    return _pictures(self).build(self)


def report_figure(self: object) -> Figure:
    """Return a matplotlib figure of the report's charts; needs the extra `plot`.

    Raises:
        UnsupportedError: Matplotlib is not installed.
        InputError: There is nothing to draw.
    """
    from loratools.charts.plot_file import figure

    pictures = _pictures(self)
    return figure(pictures.build(self), title=pictures.title(self))


def _pictures(report: object) -> Pictures:
    """How the charts of a report are built: an entry of `PICTURES` in `charts.py` beside the module of its class."""
    room = type(report).__module__.rpartition(".")[0]
    pictures: Pictures = import_module(f"{room}.charts").PICTURES[type(report).__name__]
    return pictures
