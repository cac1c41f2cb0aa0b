"""The pictures of a spectrum: singular values, what each rank keeps, and where in the model the change is."""

from __future__ import annotations

from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.spectra import Spectrum, singular_value_lines
from loratools.charts.values import Chart, Lines, Mark, Series
from loratools.ops.spectrum.report import SpectrumReport

_ENERGY = 0.9


def charts(report: SpectrumReport) -> tuple[Chart, ...]:
    """Return the singular values, the curve of ranks, and maps of the norm and of the rank for 90% of the energy."""
    spectra = [Spectrum(m.name, m.singular_values, m.norm) for m in report.modules]
    edges = [m.noise_edge / m.singular_values[0] for m in report.modules if m.noise_edge and m.norm]
    built = (
        singular_value_lines(spectra, most=report.table[-1].rank, noise_edges=edges),
        rank_curve(report),
        module_map(
            [(s.name, s.rank_for(_ENERGY)) for s in spectra],
            title="Rank that keeps 90% of the energy",
            unit="rank",
            note="Energy is the squared Frobenius norm; a place is empty where the known singular values do not reach "
            "90%.",
        ),
        module_map(
            [(m.name, m.norm) for m in report.modules],
            title="Norm of the change",
            unit="Frobenius norm of dW",
        ),
    )
    return tuple(chart for chart in built if chart is not None)


def rank_curve(report: SpectrumReport) -> Lines:
    """Return what each rank keeps of the energy, the same rank for all modules, or as many numbers shared out."""
    ranks = tuple(float(row.rank) for row in report.table)
    knee = () if report.knee is None else (Mark(f"knee: rank {report.knee}", x=float(report.knee)),)
    return Lines(
        title="What a rank keeps",
        x_label="rank",
        y_label="energy kept (share of the squared Frobenius norm)",
        series=(
            Series("the same rank in all modules", ranks, tuple(row.energy for row in report.table), points=True),
            Series("as many numbers, shared out", ranks, tuple(row.energy_shared for row in report.table), points=True),
            Series("the module that loses most", ranks, tuple(row.worst_energy for row in report.table), points=True),
        ),
        log_x=True,
        marks=knee,
        percent=True,
    )


PICTURES = {"SpectrumReport": Pictures(charts, lambda report: f"spectrum of {report.source}")}
