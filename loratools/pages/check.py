"""What is wrong with adapters and models."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.ops.check.report import CheckReport
from loratools.pages.parts.contents import Contents, table, tables
from loratools.report.check import check_summary
from loratools.report.fields import Field, integer, text_field, words
from loratools.report.text import plural

# More names than this in a cell help nobody, and push the next finding off the page.
_MOST_EVIDENCE = 8


def _shortened(evidence: Sequence[str]) -> str:
    more = len(evidence) - _MOST_EVIDENCE
    return words(evidence[:_MOST_EVIDENCE]) + (f", … and {more:,} more" if more > 0 else "")


_FINDINGS = (
    text_field("path", "source"),
    text_field("severity"),
    text_field("id", "rule"),
    text_field("message"),
    text_field("fix"),
    Field("evidence", "evidence", _shortened, numeric=False),
)
_SOURCES = (
    text_field("path", "source"),
    Field("errors", "errors", integer),
    Field("warnings", "warnings", integer),
    Field("notes", "notes", integer),
    Field("baselined", "in the baseline", integer),
)


def contents(report: CheckReport) -> Contents:
    """Return what the page of a check shows."""
    sources = [
        {
            "path": source.path,
            **{f"{word}s": sum(f.severity == word for f in source.findings) for word in ("error", "warning", "note")},
            "baselined": source.baselined,
        }
        for source in report.sources
    ]
    return Contents(
        title=f"Check of {plural(len(report.sources), 'source')}",
        facts=(("result", check_summary(report).plain), ("rules", f"{len(report.rules):,} asked")),
        tables=tables(table("Findings", _FINDINGS, report.rows()), table("Sources", _SOURCES, sources)),
    )
