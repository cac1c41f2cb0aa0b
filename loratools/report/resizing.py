"""What a resizing will do, and what it did, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import RenderableType

from loratools.ops.lowrank.reduce import ReducedModule
from loratools.ops.resize.report import ResizeReport
from loratools.report.pairs import pairs
from loratools.report.rows import Column, Rows
from loratools.report.text import number, plural, ranks, safe, size


class Reduced(Protocol):
    """What is told of every adapter whose modules were brought to a rank."""

    @property
    def modules(self) -> Sequence[ReducedModule]: ...
    @property
    def error(self) -> float: ...


def resize_summary(report: ResizeReport) -> list[RenderableType]:
    """Lines printed on stderr after a resizing."""
    return [pairs([*_head(report), ("written", f"{report.output}  {size(report.bytes)}")])]


def resize_plan(report: ResizeReport, out: object) -> list[RenderableType]:
    """What `--plan` prints: every module with its ranks and error, then the whole."""
    return [modules_table(report), pairs([*_head(report), ("output", f"{out}  {size(report.bytes)}")])]


def modules_table(report: Reduced) -> Rows:
    """A row for each module: its rank before and after, and its error."""
    return Rows(
        [
            Column("module", [safe(m.name) for m in report.modules], numeric=False),
            Column("rank now", [_rank(m.rank_in) for m in report.modules]),
            Column("rank", [_rank(m.rank) for m in report.modules]),
            Column("error", [number(m.error) for m in report.modules]),
        ]
    )


def error_row(report: Reduced) -> tuple[str, str]:
    if not report.error:
        return "error", "none: the stored values are exact"
    worst = max((m.error for m in report.modules), default=0.0)
    return "error", f"{number(report.error)} relative, as stored; {number(worst)} in the worst module"


def change(modules: Sequence[ReducedModule]) -> str:
    """Return how ranks changed in words: `rank 16 to ranks 4–8`."""
    before = [m.rank_in for m in modules if m.rank_in is not None]
    return f"{ranks(before)} to {ranks(m.rank for m in modules if m.rank is not None)}"


def _rank(rank: int | None) -> str:
    return "–" if rank is None else str(rank)


def _head(report: ResizeReport) -> list[tuple[str, str]]:
    rows = [("resized", f"{plural(len(report.modules), 'module')}, {change(report.modules)}")]
    if report.unchanged:
        rows.append(("unchanged", f"{plural(report.unchanged, 'module')} small enough already, byte for byte"))
    return [*rows, error_row(report)]
