"""What a combination did, or would do, to each adapter, for people."""

from __future__ import annotations

from rich.console import RenderableType

from loratools.ops.combine.report import CombineReport
from loratools.report.fields import Field, short, text_field
from loratools.report.pairs import pairs
from loratools.report.pictures.of_reports import LEAST_ERROR, maps
from loratools.report.resizing import change, error_row, modules_table
from loratools.report.rows import Rows, columns
from loratools.report.text import plural, size

_SHARE_FIELDS = (
    Field("weight", "weight", short),
    Field("gain", "gain", short),
    Field("gain_lost", "lost by rank", short),
    Field("interference", "interference", short),
    Field("overlap", "overlap", short),
    Field("overlap_baseline", "at random", short),
)
ADAPTER_FIELDS = (text_field("path", "adapter"), *_SHARE_FIELDS)
SHARE_FIELDS = (
    text_field("name", "module"),
    Field("adapter", "adapter", lambda position: str(position + 1)),
    *_SHARE_FIELDS,
)


def combine_summary(report: CombineReport, *, every: bool = False) -> list[RenderableType]:
    """Lines printed on stderr after a combination; `every` module, if asked for."""
    written = [("written", f"{report.output}  {size(report.bytes)}")]
    if report.residual is not None:
        written.append(("residual", f"{report.residual}  {size(report.residual_bytes or 0)}"))
    return [pairs([*combine_facts(report), *written]), *_tables(report, every)]


def combine_plan(
    report: CombineReport, out: object, *, residual: object = None, every: bool = False
) -> list[RenderableType]:
    """What `--plan` prints: every module with its ranks and error, the adapters, and the whole."""
    rows = [*combine_facts(report), ("output", f"{out}  {size(report.bytes)}")]
    if report.residual_bytes is not None:
        rows.append(("residual", f"{residual}  {size(report.residual_bytes)}"))
    return [
        modules_table(report),
        pairs(rows),
        *_tables(report, every),
    ]


def combine_facts(report: CombineReport) -> list[tuple[str, str]]:
    """Return what a combination did, in pairs of a word and a text."""
    method = report.recipe.get("method", "linear")
    description = f"{plural(len(report.modules), 'module')}, {change(report.modules)}, method {method}"
    return [("combined", description), error_row(report)]


def _tables(report: CombineReport, every: bool) -> list[RenderableType]:
    adapters = Rows(columns(ADAPTER_FIELDS, [share.to_dict() for share in report.adapters]))
    tables: list[RenderableType] = [adapters]
    if every:
        tables.append(Rows(columns(SHARE_FIELDS, report.rows())))
    if report.error > LEAST_ERROR:
        tables.append(maps(report.charts, "Error"))
    return tables
