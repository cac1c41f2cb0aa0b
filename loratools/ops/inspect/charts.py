"""The pictures of an inspection with values: where in the model each adapter changes much, and of which rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loratools.charts.module_map import module_map
from loratools.charts.pictures import Pictures
from loratools.charts.spectra import Spectrum, singular_value_lines
from loratools.charts.values import Chart
from loratools.ops.inspect.entries import AdapterEntry, InspectReport

_ENERGY = 0.9


def charts(report: InspectReport) -> tuple[Chart, ...]:
    """Return the charts of each adapter; of several, each titled with its path."""
    several = len(report.sources) > 1
    return tuple(
        replace(chart, title=f"{chart.title}: {entry.path}") if several else chart
        for entry in report.sources
        if isinstance(entry, AdapterEntry)
        for chart in entry_charts(entry)
    )


def entry_charts(entry: AdapterEntry) -> tuple[Chart, ...]:
    """Return a map of norms, a map of ranks for 90% of the energy, and singular values; empty without values."""
    spectra = list(_spectra(entry))
    built = (
        module_map(
            [(m.name, m.values.norm) for m in entry.modules if m.values is not None],
            title="Norm of the change",
            unit="Frobenius norm of dW",
        ),
        module_map(
            [(s.name, s.rank_for(_ENERGY)) for s in spectra],
            title="Rank that keeps 90% of the energy",
            unit="rank",
            note="Energy is the squared Frobenius norm; a place is empty where a module changes nothing.",
        ),
        singular_value_lines(spectra),
    )
    return tuple(chart for chart in built if chart is not None)


def _spectra(entry: AdapterEntry) -> Iterator[Spectrum]:
    for module in entry.modules:
        values = module.values
        if values is not None and values.singular_values is not None and values.norm is not None:
            yield Spectrum(module.name, values.singular_values, values.norm)


PICTURES = {
    "AdapterEntry": Pictures(entry_charts, lambda entry: entry.path),
    "InspectReport": Pictures(charts, lambda report: report.sources[0].path if len(report.sources) == 1 else ""),
}
