"""The pictures of an extraction: where in the model the change is, of which rank, and how much was left out."""

from __future__ import annotations

from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.values import Chart
from loratools.ops.extract.report import ExtractReport


def charts(report: ExtractReport) -> tuple[Chart, ...]:
    """Return maps of the error, of the rank where ranks differ, and of the norm of the change; of a plan, of ranks."""
    ranks = {m.rank for m in report.modules}
    built = (
        module_map(
            [(m.name, m.error) for m in report.modules],
            title="Error of the extracted factors",
            unit="relative Frobenius error",
        ),
        module_map([(m.name, m.rank) for m in report.modules], title="Rank of each module", unit="rank")
        if len(ranks) > 1
        else None,
        module_map(
            [(m.name, m.norm) for m in report.modules],
            title="Norm of the change",
            unit="Frobenius norm of dW",
        ),
    )
    return tuple(chart for chart in built if chart is not None)


PICTURES = {"ExtractReport": Pictures(charts)}
