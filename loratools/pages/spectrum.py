"""Singular values, and what each rank would keep."""

from __future__ import annotations

from loratools.ops.spectrum.report import SpectrumReport
from loratools.pages.parts.contents import Contents, table, tables, warnings
from loratools.report.fields import text_field
from loratools.report.spectrum import MODULE_FIELDS, knee_text, rank_fields, spectrum_facts

_SKIPPED = (text_field("name", "tensor"), text_field("why", "reason"))


def contents(report: SpectrumReport) -> Contents:
    """Return what the page of a spectrum shows."""
    return Contents(
        title=f"Spectrum of {report.source}" + (f" against {report.base}" if report.base is not None else ""),
        facts=(*spectrum_facts(report), ("knee", knee_text(report))),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Ranks", rank_fields(report), [vars(row) for row in report.table]),
            table("Modules", MODULE_FIELDS, report.rows()),
            table("Without a spectrum", _SKIPPED, [vars(skipped) for skipped in report.skipped]),
        ),
    )
