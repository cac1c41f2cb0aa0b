"""An adapter at another rank."""

from __future__ import annotations

from loratools.ops.resize.report import ResizeReport
from loratools.pages.parts.contents import Contents, table, tables, warnings
from loratools.report.resizing import RANK_FIELDS, resize_facts
from loratools.report.text import size


def contents(report: ResizeReport) -> Contents:
    """Return what is shown of a resizing, or of its plan."""
    facts = [*resize_facts(report), ("size", size(report.bytes))]
    if report.output is not None:
        facts.append(("written", str(report.output)))
    return Contents(
        title="Resized adapter" if report.output is not None else "Plan: a resized adapter",
        facts=tuple(facts),
        remarks=warnings(report.warnings),
        tables=tables(table("Modules", RANK_FIELDS, report.rows())),
    )
