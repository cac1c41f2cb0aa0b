"""The pictures of a verification: where in the model the adapters' changes are, and with which weight."""

from __future__ import annotations

from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.values import Chart
from loratools.ops.verify.report import VerifyReport


def charts(report: VerifyReport) -> tuple[Chart, ...]:
    """Return a map of the gain, and of each single adapter's weight where it is not the one that was given."""
    weights = [(t.name, t.weights[0]) for t in report.tensors if len(t.weights) == 1]
    built = (
        module_map(
            [(t.name, t.gain) for t in report.tensors],
            title="Gain: how much of the adapters is in the merged weights",
            unit="gain (1: all of their change)",
            neutral=1.0,
        ),
        module_map(
            weights,
            title="Weight that the adapter was merged with",
            unit="weight / weight that was given",
            neutral=1.0,
        )
        if report.verdict == "different" and len(weights) == len(report.tensors)
        else None,
    )
    return tuple(chart for chart in built if chart is not None)


PICTURES = {"VerifyReport": Pictures(charts, lambda report: f"verification of {report.merged}")}
