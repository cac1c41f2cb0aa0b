"""Spectra for people: a plot of singular values, a row for each module if asked for, and the table of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.ops.spectrum.report import ModuleSpectrum, SpectrumReport
from loratools.report.fields import Field, percent, text_field
from loratools.report.pairs import pairs
from loratools.report.pictures.of_reports import maps
from loratools.report.rows import Rows, columns
from loratools.report.text import interval, plural, shape, size

_WIDTH, _HEIGHT = 60, 12
# Of the modules, drawn beside the median.
_LOW, _HIGH = 0.1, 0.9


def spectrum_report(report: SpectrumReport, *, modules: bool) -> list[RenderableType]:
    """What `loratools spectrum` prints."""
    shown: list[RenderableType] = [
        pairs(spectrum_facts(report)),
        Text(),
        *_plot(report.modules, report.table[-1].rank),
        maps(report.charts, "Singular values", "Rank that keeps"),
        Text(),
    ]
    if modules:
        shown += [_modules(report), Text()]
    return [*shown, _table(report), Text(), pairs([("knee", knee_text(report))])]


def knee_text(report: SpectrumReport) -> str:
    """Return the rank beyond which there is little to gain, and why."""
    return (f"rank {report.knee}: " if report.knee is not None else "") + report.why


def spectrum_facts(report: SpectrumReport) -> list[tuple[str, str]]:
    """Return what a spectrum says of all modules, in pairs of a word and a text."""
    kinds = f"{plural(len(report.modules), 'module')}" + (f"; {report.unchanged} unchanged" if report.unchanged else "")
    rows = [("change", kinds)]
    rows.append(("stable rank", interval(m.stable_rank for m in report.modules)))
    partly = any(not m.complete for m in report.modules)
    rows.append(("effective", interval(m.effective_rank for m in report.modules) + (", estimated" if partly else "")))
    if numerical_ranks := [m.numerical_rank for m in report.modules if m.numerical_rank is not None]:
        rows.append(("numerical", interval(map(float, numerical_ranks))))
    if edges := [float(m.above_edge) for m in report.modules if m.above_edge is not None]:
        rows.append(("above noise", f"{interval(edges)} directions rise above the rounding of the checkpoint"))
    if errors := [m.quantization_error / m.norm for m in report.modules if m.quantization_error and m.norm]:
        rows.append(("quantisation", f"its error alone has {interval(errors)} of the norm of the change"))
    if cuts := [float(m.above_cut) for m in report.modules if m.above_cut is not None]:
        rows.append(("worth keeping", f"{interval(cuts)} directions, by Gavish and Donoho's cut for that noise"))
    return rows


def rank_fields(report: SpectrumReport) -> tuple[Field, ...]:
    """Return the columns of the table of ranks."""
    return (
        Field("rank", "rank", str),
        Field("energy", "energy", percent),
        Field("error", "error", "{:.4f}".format),
        Field("energy_shared", "shared out", percent),
        Field("bytes", f"file ({report.dtype})", size),
        Field("worst_energy", "worst", percent),
        text_field("worst_module", "module", below=True),
    )


MODULE_FIELDS = (
    text_field("name", "module"),
    Field("shape", "shape", shape),
    Field("norm", "norm", "{:.4g}".format),
    Field("singular_values", "largest", lambda values: f"{values[0]:.4g}"),
    Field("stable_rank", "stable", "{:.3g}".format),
    Field("effective_rank", "effective", "{:.3g}".format),
    Field("numerical_rank", "numerical", str),
    Field("above_edge", "above noise", str),
)


def _table(report: SpectrumReport) -> Rows:
    bold = [i for i, row in enumerate(report.table) if row.rank == report.knee]
    return Rows(columns(rank_fields(report), [vars(row) for row in report.table]), bold=bold)


def _modules(report: SpectrumReport) -> Rows:
    return Rows(columns(MODULE_FIELDS, report.rows()))


def _plot(modules: Sequence[ModuleSpectrum], most: int) -> list[RenderableType]:
    """Singular values over their number, both logarithmic, each module's divided by its largest: median and the middle
    four fifths of the modules, and where the noise begins in the median module."""
    curves = [
        [s / m.singular_values[0] for s in m.singular_values[:most] if s > 0]
        for m in modules
        if m.singular_values and m.singular_values[0] > 0
    ]
    longest = max((len(c) for c in curves), default=0)
    if longest < 2:
        return []
    columns = []
    for x in range(_WIDTH):
        place = round(math.exp(math.log(longest) * x / (_WIDTH - 1))) - 1
        at = sorted(c[place] for c in curves if len(c) > place)
        columns.append((_quantile(at, _LOW), _quantile(at, 0.5), _quantile(at, _HIGH)))
    bottom = math.log10(max(min(low for low, _, _ in columns), 1e-8))
    if bottom > -0.05:
        return []
    edge = _quantile(
        sorted(m.noise_edge / m.singular_values[0] for m in modules if m.noise_edge and m.singular_values[0] > 0), 0.5
    )

    def row_of(value: float) -> int:
        return min(_HEIGHT - 1, max(0, round(math.log10(max(value, 1e-300)) / bottom * (_HEIGHT - 1))))

    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    if edge and 10**bottom <= edge <= 1:
        grid[row_of(edge)] = ["╌"] * _WIDTH
    for x, (low, middle, high) in enumerate(columns):
        for y in range(row_of(high), row_of(low) + 1):
            grid[y][x] = "·"
        grid[row_of(middle)][x] = "•"
    lines = []
    for y, cells in enumerate(grid):
        label = f"{10 ** (bottom * y / (_HEIGHT - 1)):.1e}" if y % 3 == 0 or y == _HEIGHT - 1 else ""
        lines.append(Text(f"{label:>8} │{''.join(cells).rstrip()}"))
    centre = str(round(math.sqrt(longest)))
    axis = f"1{centre:^{_WIDTH - 1 - len(str(longest))}}{longest}"
    legend = "sigma / sigma_1 by number; • median of the modules, · most of them"
    legend += ", ╌ rounding noise" if edge and 10**bottom <= edge <= 1 else ""
    return [*lines, Text(f"{'':>8} └{'─' * _WIDTH}"), Text(f"{'':>10}{axis}"), Text(f"{'':>10}{legend}", style="dim")]


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else 0.0
