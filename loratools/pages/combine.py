"""One adapter of several: what became of each."""

from __future__ import annotations

from loratools.ops.combine.report import CombineReport
from loratools.pages.parts.contents import Contents, table, tables, warnings
from loratools.report.combination import ADAPTER_FIELDS, SHARE_FIELDS, combine_facts
from loratools.report.resizing import RANK_FIELDS
from loratools.report.text import plural, size


def contents(report: CombineReport) -> Contents:
    """Return what the page of a combination, or of its plan, shows."""
    facts = [*combine_facts(report), ("size", size(report.bytes))]
    if report.output is not None:
        facts.append(("written", str(report.output)))
    if report.residual is not None:
        facts.append(("residual", f"{report.residual}  {size(report.residual_bytes or 0)}"))
    count = plural(len(report.adapters), "adapter")
    return Contents(
        title=f"Combination of {count}" if report.output is not None else f"Plan: a combination of {count}",
        facts=tuple(facts),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Adapters", ADAPTER_FIELDS, [share.to_dict() for share in report.adapters]),
            table("Modules", RANK_FIELDS, [module.without_adapters() for module in report.modules]),
            table("Each adapter in each module", SHARE_FIELDS, report.rows()),
        ),
    )
