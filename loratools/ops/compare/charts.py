"""The pictures of a comparison: of two adapters where they agree, of more a matrix, of a training its way by step."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.charts.labels import labels
from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.values import BarGroup, Bars, Chart, HeatMap, Lines, Series
from loratools.ops.compare.report import CompareReport, ComparisonMatrix

_COSINES = (-1.0, 1.0)
_SHARES = (0.0, 1.0)


def pair_charts(report: CompareReport) -> tuple[Chart, ...]:
    """Return maps of the cosine and of the overlap, and bars of what each would meet in the sum of both."""
    overlaps = ((report.overlap, report.overlap_baseline), (report.output_overlap, report.output_baseline))
    built = (
        module_map(
            [(m.name, m.cosine) for m in report.modules],
            title="Cosine of the two changes",
            unit="cosine",
            limits=_COSINES,
            neutral=0.0,
        ),
        module_map(
            [(m.name, m.overlap) for m in report.modules],
            title="Overlap of the inputs that both react to",
            unit="share of the row space in common",
            limits=_SHARES,
        ),
        Bars(
            title="Overlap beside chance",
            unit="share of the subspace in common",
            labels=("inputs", "outputs"),
            groups=(
                BarGroup("these adapters", tuple(measured for measured, _ in overlaps)),
                BarGroup("random adapters", tuple(baseline for _, baseline in overlaps)),
            ),
            label="side of the modules",
        ),
        Bars(
            title="Gain and interference in the sum of both",
            unit="share of the adapter's own change",
            labels=labels(report.paths),
            groups=(BarGroup("gain", report.gains), BarGroup("interference", report.interferences)),
            note="A gain of 1 and an interference of 0 mean that the other changes nothing for this adapter.",
        ),
    )
    return tuple(chart for chart in built if chart is not None)


def matrix_charts(report: ComparisonMatrix) -> tuple[Chart, ...]:
    """Return matrices of the cosine and of the overlap beside chance; of one training also lines by step."""
    names = labels([adapter.path for adapter in report.adapters])
    matrices = (
        _matrix(report, names, report.cosine, "Cosine of every two adapters", "cosine", _COSINES),
        _matrix(report, names, report.overlap, "Overlap of the inputs", "share of the row space in common", _SHARES),
        _matrix(
            report,
            names,
            report.overlap_baseline,
            "Overlap of the inputs at random",
            "share of the row space in common, of random adapters of these ranks",
            _SHARES,
        ),
    )
    return (*_by_step(report), *matrices)


def _matrix(
    report: ComparisonMatrix,
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
    unit: str,
    limits: tuple[float, float],
) -> HeatMap:
    """A matrix in the order in which alike ones stand together. Nothing is on the diagonal: it says nothing."""
    ordered = tuple(names[i] for i in report.order)
    return HeatMap(
        title=title,
        unit=unit,
        rows=ordered,
        columns=ordered,
        values=tuple(tuple(None if i == j else values[i][j] for j in report.order) for i in report.order),
        diverging=limits == _COSINES,
        limits=limits,
        row_label="adapter",
        column_label="adapter",
        note="Adapters that are alike stand together; the diagonal is left empty.",
    )


def _by_step(report: ComparisonMatrix) -> tuple[Chart, ...]:
    """Norms and cosines over the steps of one training; nothing where the adapters are of several."""
    steps = [adapter.step for adapter in report.adapters]
    if any(step is None for step in steps):
        return ()
    positions = sorted(range(len(steps)), key=lambda i: steps[i] or 0)
    xs = tuple(float(steps[i] or 0) for i in positions)
    last = positions[-1]
    before = [None, *(report.cosine[i][j] for i, j in zip(positions[1:], positions, strict=False))]
    return (
        Lines(
            title="Norm of the change by step",
            x_label="step",
            y_label="Frobenius norm of dW, all modules",
            series=(Series("norm", xs, tuple(report.adapters[i].norm for i in positions), points=True),),
        ),
        Lines(
            title="Direction of the change by step",
            x_label="step",
            y_label="cosine",
            series=(
                Series("to the last state", xs, tuple(report.cosine[i][last] for i in positions), points=True),
                Series("to the state before", xs, tuple(before), points=True),
            ),
        ),
    )


PICTURES = {
    "CompareReport": Pictures(pair_charts, lambda report: " and ".join(report.paths)),
    "ComparisonMatrix": Pictures(matrix_charts),
}
