"""How two adapters compare, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from loratools.ops.compare import ComparedModule, CompareReport
from loratools.report.groups import grouped
from loratools.report.pairs import pairs
from loratools.report.rows import Column, Rows
from loratools.report.text import number, plural, safe

_HEADINGS = ("cosine", "overlap", "at random", "output overlap", "at random", "norm ratio", "angles")


def comparison_tables(report: CompareReport, *, every: bool = False) -> list[RenderableType]:
    """The whole, and with `every` each module."""
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
        ("in the sum", f"gains {_both(report.gains)}, interferences {_both(report.interferences)}"),
    ]
    if report.replacements_equal or report.replacements_differ:
        equal, other = len(report.replacements_equal), len(report.replacements_differ)
        rows.append(("replaced", f"{plural(equal, 'weight')} alike, {other} different"))
    for word, names in (("only in 1st", report.only_in_first), ("only in 2nd", report.only_in_second)):
        if names:
            rows.append((word, _names(names)))
    if not every:
        return [pairs(rows)]
    cells = [_cells(module) for module in report.modules]
    columns = [Column("module", [safe(m.name) for m in report.modules], numeric=False)]
    columns += [Column(head, [row[i] for row in cells]) for i, head in enumerate(_HEADINGS)]
    return [pairs(rows), Rows(columns)]


def _cells(module: ComparedModule) -> list[str]:
    numbers = (
        module.cosine,
        module.overlap,
        module.overlap_baseline,
        module.output_overlap,
        module.output_baseline,
        module.norm_ratio,
    )
    angles = f"{module.angles[0]:.3g}°–{module.angles[-1]:.3g}°" if module.angles else "–"
    return [*map(_digits, numbers), angles]


def _names(names: Sequence[str]) -> str:
    groups = [g.name for g in grouped((name, "", name) for name in names)]
    shown = ", ".join(groups[:6])
    return shown + (f", and {len(groups) - 6} more" if len(groups) > 6 else "")


def _both(values: Sequence[float | None]) -> str:
    return " and ".join(map(_digits, values))


def _digits(value: float | None) -> str:
    return "–" if value is None else number(value)
