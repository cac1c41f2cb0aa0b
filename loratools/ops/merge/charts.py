"""The pictures of a merge: where in the model the update survived rounding."""

from __future__ import annotations

from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.values import Chart
from loratools.ops.merge.report import MergeReport


def charts(report: MergeReport) -> tuple[Chart, ...]:
    """Return a map of the gain, and of what quantising again cost; empty of a plan, which measures nothing."""
    built = (
        module_map(
            [(t.name, t.gain) for t in report.tensors],
            title="Gain: how much of the update is in the merged weights",
            unit="gain (1: all of the update)",
            neutral=1.0,
        ),
        module_map(
            [(t.name, t.error_after) for t in report.requantized],
            title="Error of quantising again",
            unit="error / norm of the update",
        ),
    )
    return tuple(chart for chart in built if chart is not None)


PICTURES = {"MergeReport": Pictures(charts)}
