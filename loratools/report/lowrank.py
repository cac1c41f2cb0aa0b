"""What combining and resizing will do, and what they did, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.ops._reduce import Module
from loratools.ops.combine import CombineReport
from loratools.ops.resize import ResizeReport
from loratools.report.pairs import pairs
from loratools.report.text import number, plural, safe, size


def combine_summary(report: CombineReport) -> list[RenderableType]:
    """What is told on stderr after a combination."""
    rows = [("combined", f"{plural(len(report.modules), 'module')}, {_change(report.modules)}"), _error(report)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("adapter", overflow="fold")
    for heading in ("weight", "gain", "interference"):
        table.add_column(heading, justify="right")
    for share in report.adapters:
        told = [f"{v:.4g}" if v is not None else "–" for v in (share.weight, share.gain, share.interference)]
        table.add_row(Text(safe(share.path)), *told)
    return [pairs([*rows, ("written", f"{report.output}  {size(report.bytes or 0)}")]), table]


def resize_summary(report: ResizeReport) -> list[RenderableType]:
    """What is told on stderr after a resizing."""
    rows = [("resized", f"{plural(len(report.modules), 'module')}, {_change(report.modules)}")]
    if report.unchanged:
        rows.append(("unchanged", f"{plural(report.unchanged, 'module')} small enough already, byte for byte"))
    return [pairs([*rows, _error(report), ("written", f"{report.output}  {size(report.bytes or 0)}")])]


def plan_tables(report: CombineReport | ResizeReport, out: object) -> list[RenderableType]:
    """What `--plan` prints: every module with its ranks, then the whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("module", overflow="fold")
    for heading in ("rank now", "rank"):
        table.add_column(heading, justify="right")
    for module in report.modules:
        ranks = [module.rank_in, module.rank]
        table.add_row(Text(safe(module.name)), *("by value" if r is None else str(r) for r in ranks))
    nbytes = "size known when computed" if report.bytes is None else size(report.bytes)
    return [table, pairs([("modules", str(len(report.modules))), ("output", f"{out}  {nbytes}")])]


def _error(report: CombineReport | ResizeReport) -> tuple[str, str]:
    if not report.error:
        return "error", "none: the stored values are exact"
    worst = max((m.error or 0.0 for m in report.modules), default=0.0)
    return "error", f"{number(report.error)} relative, as stored; {number(worst)} in the worst module"


def _change(modules: Sequence[Module]) -> str:
    return f"{_ranks(m.rank_in for m in modules)} to {_ranks(m.rank or 0 for m in modules)}"


def _ranks(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {found[0]}–{found[-1]}" if found else "no rank"
