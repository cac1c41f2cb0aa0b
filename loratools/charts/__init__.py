"""Charts as values: what a picture of a report shows, before anything is drawn.

A report builds its charts (`report.charts()`, from `ops/VERB/charts.py`); a renderer draws them: the terminal
(`report/pictures/`), matplotlib (`charts/figure.py`), SVG in a page. A chart knows no renderer, and no renderer knows a
report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from loratools.charts.values import Chart


@runtime_checkable
class Charted(Protocol):
    """A report that can be shown as pictures."""

    def charts(self) -> tuple[Chart, ...]:
        """Return the charts of the report, the one that says most first; empty if there is nothing to draw."""
        ...


def charts_of(report: object) -> tuple[Chart, ...]:
    """Return the charts of a report, the one that says most first; empty if there is nothing to draw."""
    return report.charts() if isinstance(report, Charted) else ()
