"""What a combination did, or would do, to each adapter, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from loratools.ops.combine.report import CombineReport
from loratools.ops.combine.shares import ModuleShare, Share
from loratools.report.pairs import pairs
from loratools.report.resizing import change, error_row, modules_table
from loratools.report.rows import Column, Rows
from loratools.report.text import plural, safe, size

_HEADINGS = ("weight", "gain", "lost by rank", "interference", "overlap", "at random")


def combine_summary(report: CombineReport, *, every: bool = False) -> list[RenderableType]:
    """Lines printed on stderr after a combination; `every` module, if asked for."""
    written = [("written", f"{report.output}  {size(report.bytes)}")]
    if report.residual is not None:
        written.append(("residual", f"{report.residual}  {size(report.residual_bytes or 0)}"))
    return [pairs([*_head(report), *written]), *_tables(report, every)]


def combine_plan(
    report: CombineReport, out: object, *, residual: object = None, every: bool = False
) -> list[RenderableType]:
    """What `--plan` prints: every module with its ranks and error, the adapters, and the whole."""
    rows = [*_head(report), ("output", f"{out}  {size(report.bytes)}")]
    if report.residual_bytes is not None:
        rows.append(("residual", f"{residual}  {size(report.residual_bytes)}"))
    return [
        modules_table(report),
        pairs(rows),
        *_tables(report, every),
    ]


def _head(report: CombineReport) -> list[tuple[str, str]]:
    method = report.recipe.get("method", "linear")
    description = f"{plural(len(report.modules), 'module')}, {change(report.modules)}, method {method}"
    return [("combined", description), error_row(report)]


def _tables(report: CombineReport, every: bool) -> list[RenderableType]:
    table = _rows("adapter", [(share.path, *_cells(share)) for share in report.adapters], _HEADINGS)
    if not every:
        return [table]
    by_module = [
        (module.name, str(share.adapter + 1), *_cells(share)) for module in report.modules for share in module.adapters
    ]
    return [table, _rows("module", by_module, ("adapter", *_HEADINGS))]


def _cells(share: Share | ModuleShare) -> list[str]:
    numbers = (
        share.weight,
        share.gain,
        share.gain_lost,
        share.interference,
        share.overlap,
        share.overlap_baseline,
    )
    return [_short(value) for value in numbers]


def _short(value: float | None) -> str:
    # Below this it is rounding, and a column of exponents says less than a zero.
    return "–" if value is None else "0" if abs(value) < 5e-7 else f"{value:.4g}"


def _rows(first: str, rows: Sequence[Sequence[str]], headings: Sequence[str]) -> Rows:
    columns = [Column(first, [safe(row[0]) for row in rows], numeric=False)]
    return Rows([*columns, *(Column(head, [row[i + 1] for row in rows]) for i, head in enumerate(headings))])
