"""How adapters compare, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.charts.labels import common_folder
from loratools.charts.values import HeatMap
from loratools.ops.compare.report import CompareReport, ComparisonMatrix
from loratools.report.fields import Field, integer, text_field
from loratools.report.groups import grouped
from loratools.report.pairs import pairs
from loratools.report.pictures.heat_map import AdapterMatrix
from loratools.report.pictures.of_reports import maps
from loratools.report.pictures.on_terminal import OnTerminal
from loratools.report.rows import Column, Rows, columns
from loratools.report.text import number, plural, safe

_LIKENESS = (
    Field("cosine", "cosine"),
    Field("overlap", "overlap"),
    Field("overlap_baseline", "at random"),
    Field("output_overlap", "output overlap"),
    Field("output_overlap_baseline", "at random"),
    Field("norm_ratio", "norm ratio"),
)
MODULE_FIELDS = (
    text_field("name", "module"),
    *_LIKENESS,
    Field("principal_angles", "angles", lambda angles: f"{angles[0]:.3g}°–{angles[-1]:.3g}°"),
)
PAIR_FIELDS = (Field("modules", "modules", integer), *_LIKENESS)


def comparison_tables(report: CompareReport, *, every: bool = False) -> list[RenderableType]:
    """The whole, and with `every` each module."""
    facts: list[RenderableType] = [pairs(comparison_facts(report)), maps(report.charts, "Cosine")]
    if not every:
        return facts
    return [*facts, Rows(columns(MODULE_FIELDS, report.rows()))]


def comparison_facts(report: CompareReport) -> list[tuple[str, str]]:
    """Return what a comparison of two says of all modules, in pairs of a word and a text."""
    rows = [
        ("modules", f"{plural(len(report.modules), 'module')} in both"),
        ("cosine", _digits(report.cosine)),
        ("norm ratio", _digits(report.norm_ratio)),
        (
            "inputs",
            f"{_digits(report.overlap)} of the row spaces in common, {_digits(report.overlap_baseline)} at random",
        ),
        (
            "outputs",
            f"{_digits(report.output_overlap)} of the column spaces, {_digits(report.output_baseline)} at random",
        ),
        ("in the sum", f"gains {_of_both(report.gains)}, interferences {_of_both(report.interferences)}"),
    ]
    if report.replacements_equal or report.replacements_differ:
        equal, other = len(report.replacements_equal), len(report.replacements_differ)
        rows.append(("replaced", f"{plural(equal, 'weight')} alike, {other} different"))
    for word, names in (("only in 1st", report.only_in_first), ("only in 2nd", report.only_in_second)):
        if names:
            rows.append((word, _names(names)))
    return rows


def matrix_tables(report: ComparisonMatrix, *, every: bool = False) -> list[RenderableType]:
    """Who is who, the cosines and the overlaps of all pairs in an order in which alike ones stand together.

    With `every` also all numbers of each pair; of states of one training their way by step.
    """
    folder = common_folder([adapter.path for adapter in report.adapters])
    names = [safe(adapter.path[len(folder) :]) for adapter in report.adapters]
    marks = {position: f"{at + 1}" for at, position in enumerate(report.order)}
    blocks: list[RenderableType] = [Text(safe(folder), style="bold", overflow="fold")] if folder else []
    blocks += [
        Rows(
            [
                Column("adapter", [names[i] for i in report.order], numeric=False),
                Column("number", [marks[i] for i in report.order]),
                Column("modules", [f"{report.adapters[i].modules:,}" for i in report.order]),
                Column("norm", [number(report.adapters[i].norm) for i in report.order]),
            ],
            ruled=True,
        ),
        "",
        Text("cosine"),
        _cosines(report, marks),
        "",
        Text("overlap of the inputs that they react to, and below it that of random adapters of these ranks"),
        _matrix(report, marks, report.overlap),
        _matrix(report, marks, report.overlap_baseline),
    ]
    alike = [cluster for cluster in report.clusters if len(cluster) > 1]
    if alike:
        groups = "; ".join(" ".join(marks[i] for i in cluster) for cluster in alike)
        blocks += ["", pairs([("alike", f"{groups} (mean cosine of at least 0.5)")])]
    if all(adapter.step is not None for adapter in report.adapters):
        blocks += ["", _by_step(report)]
    if every:
        blocks += ["", _pairs_table(report, marks)]
    return blocks


def _cosines(report: ComparisonMatrix, marks: Mapping[int, str]) -> RenderableType:
    """The cosines of all pairs: on a terminal with colours, which show alike ones at a glance."""
    table = _matrix(report, marks, report.cosine)

    def coloured() -> list[RenderableType]:
        cosines = next(chart for chart in report.charts() if isinstance(chart, HeatMap))
        return [AdapterMatrix(cosines, table)]

    return OnTerminal(coloured, [table])


def _matrix(report: ComparisonMatrix, marks: Mapping[int, str], values: Sequence[Sequence[float | None]]) -> Rows:
    heads = [Column("", [marks[i] for i in report.order])]
    cells = [Column(marks[j], [_short(values[i][j], i == j) for i in report.order]) for j in report.order]
    return Rows([*heads, *cells], ruled=True)


def _short(value: float | None, diagonal: bool) -> str:
    return "·" if diagonal else "–" if value is None else f"{value:.2f}"


def _by_step(report: ComparisonMatrix) -> Rows:
    """The states of a training by step: their norms, and their cosines to the last and to the one before."""
    positions = sorted(range(len(report.adapters)), key=lambda i: report.adapters[i].step or 0)
    last = positions[-1]
    before = [None, *positions]
    return Rows(
        [
            Column("step", [f"{report.adapters[i].step:,}" for i in positions]),
            Column("norm", [number(report.adapters[i].norm) for i in positions]),
            Column("cosine to the last", [_digits(report.cosine[i][last]) for i in positions]),
            Column(
                "to the one before",
                [_digits(None if j is None else report.cosine[i][j]) for i, j in zip(positions, before, strict=False)],
            ),
        ],
        ruled=True,
    )


def _pairs_table(report: ComparisonMatrix, marks: Mapping[int, str]) -> Rows:
    pair = Column("pair", [f"{marks[p.first]} {marks[p.second]}" for p in report.pairs], numeric=False)
    return Rows([pair, *columns(PAIR_FIELDS, report.rows())], ruled=True)


def _names(names: Sequence[str]) -> str:
    groups = [g.name for g in grouped((name, "", name) for name in names)]
    shown = ", ".join(groups[:6])
    return shown + (f", and {len(groups) - 6} more" if len(groups) > 6 else "")


def _of_both(values: Sequence[float | None]) -> str:
    return " and ".join(map(_digits, values))


def _digits(value: float | None) -> str:
    return "–" if value is None else number(value)
