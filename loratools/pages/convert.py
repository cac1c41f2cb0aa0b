"""An adapter in another format."""

from __future__ import annotations

from loratools.ops.convert.report import ConvertReport
from loratools.pages.parts.contents import Contents, table, tables, warnings
from loratools.report.conversion import conversion_facts
from loratools.report.fields import Field, text_field
from loratools.report.text import size

_MODULES = (text_field("name", "module"), Field("error", "relative error"))
_DROPPED = (text_field("what"), text_field("name"), text_field("why", "reason"))


def contents(report: ConvertReport) -> Contents:
    """Return what is shown of a conversion, or of its plan."""
    facts = conversion_facts(report)
    if report.output is not None:
        facts.append(("written", f"{report.output}  {size(report.bytes or 0)}"))
    formats = f"{report.source_format} to {report.target_format}"
    return Contents(
        title=f"Conversion from {formats}" if report.output is not None else f"Plan: a conversion from {formats}",
        facts=tuple(facts),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Modules", _MODULES, report.rows()),
            table("Not in the result", _DROPPED, [vars(dropped) for dropped in report.dropped]),
        ),
    )
