"""What a resizing will do, and what it did, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import RenderableType

from loratools.ops.lowrank.reduce import ReducedModule
from loratools.ops.resize.report import ResizeReport
from loratools.report.fields import Field, text_field
from loratools.report.pairs import pairs
from loratools.report.rows import Rows, columns
from loratools.report.text import number, plural, ranks, size

RANK_FIELDS = (
    text_field("name", "module"),
    Field("rank_in", "rank now", str),
    Field("rank", "rank", str),
    Field("error", "error"),
)


class Reduced(Protocol):
    """The lines for each adapter whose modules were truncated to a rank."""

    @property
    def modules(self) -> Sequence[ReducedModule]: ...
    @property
    def error(self) -> float: ...


def resize_summary(report: ResizeReport) -> list[RenderableType]:
    """Lines printed on stderr after a resizing."""
    return [pairs([*resize_facts(report), ("written", f"{report.output}  {size(report.bytes)}")])]


def resize_plan(report: ResizeReport, out: object) -> list[RenderableType]:
    """What `--plan` prints: every module with its ranks and error, then the whole."""
    return [modules_table(report), pairs([*resize_facts(report), ("output", f"{out}  {size(report.bytes)}")])]


def resize_facts(report: ResizeReport) -> list[tuple[str, str]]:
    """Return what a resizing did, in pairs of a word and a text."""
    rows = [("resized", f"{plural(len(report.modules), 'module')}, {change(report.modules)}")]
    if report.unchanged:
        rows.append(("unchanged", f"{plural(report.unchanged, 'module')} small enough already, byte for byte"))
    return [*rows, error_row(report)]


def modules_table(report: Reduced) -> Rows:
    """A row for each module: its rank before and after, and its error."""
    return Rows(columns(RANK_FIELDS, [vars(module) for module in report.modules]))


def error_row(report: Reduced) -> tuple[str, str]:
    if not report.error:
        return "error", "none: the stored values are exact"
    worst = max((m.error for m in report.modules), default=0.0)
    return "error", f"{number(report.error)} relative, as stored; {number(worst)} in the worst module"


def change(modules: Sequence[ReducedModule]) -> str:
    """Return how ranks changed in words: `rank 16 to ranks 4–8`."""
    before = [m.rank_in for m in modules if m.rank_in is not None]
    return f"{ranks(before)} to {ranks(m.rank for m in modules if m.rank is not None)}"
