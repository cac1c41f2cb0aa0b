"""The pictures of a combination: what is left of each adapter, how much they disturb each other, and where."""

from __future__ import annotations

from loratools.charts.labels import labels
from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.values import BarGroup, Bars, Chart
from loratools.ops.combine.report import CombineReport
from loratools.ops.combine.side_by_side import MethodsReport


def charts(report: CombineReport) -> tuple[Chart, ...]:
    """Return bars of gains, interferences and overlaps, a map of errors, and of each adapter a map of its gain."""
    shares = report.adapters
    names = labels([share.path for share in shares])
    gains = Bars(
        title="Gain and interference of each adapter",
        unit="share of the adapter's own change",
        labels=names,
        groups=(
            BarGroup("weight", tuple(share.weight for share in shares)),
            BarGroup("gain", tuple(share.gain for share in shares)),
            BarGroup("interference", tuple(share.interference for share in shares)),
        ),
        note="Where nothing overlaps, the gain is the weight.",
    )
    overlaps = Bars(
        title="Overlap with the other adapters beside chance",
        unit="share of the row space in common",
        labels=names,
        groups=(
            BarGroup("these adapters", tuple(share.overlap for share in shares)),
            BarGroup("random adapters", tuple(share.overlap_baseline for share in shares)),
        ),
    )
    maps = (
        module_map(
            [(m.name, m.error) for m in report.modules],
            title="Error of the stored result",
            unit="relative Frobenius error",
            note="0 where the ranks add up and nothing is rounded.",
        ),
        *(
            module_map(
                [(m.name, share.gain) for m in report.modules for share in m.adapters if share.adapter == position],
                title=f"Gain of {name}",
                unit="gain: share of the adapter's own change in the result",
                neutral=shares[position].weight,
                note="The middle of the scale is the weight of the adapter.",
            )
            for position, name in enumerate(names)
        ),
    )
    return (gains, overlaps, *(chart for chart in maps if chart is not None))


def methods_charts(report: MethodsReport) -> tuple[Chart, ...]:
    """Return bars of the largest interference and of the error of each method that can combine the adapters."""
    methods = [outcome for outcome in report.methods if outcome.refused is None]
    if not methods:
        return ()
    return (
        Bars(
            title="Largest interference and error of each method",
            unit="interference: share of an adapter's own change; error: relative Frobenius error",
            labels=tuple(outcome.method for outcome in methods),
            groups=(
                BarGroup("interference", tuple(outcome.interference for outcome in methods)),
                BarGroup("error", tuple(outcome.error for outcome in methods)),
            ),
            label="method",
        ),
    )


PICTURES = {"CombineReport": Pictures(charts), "MethodsReport": Pictures(methods_charts)}
