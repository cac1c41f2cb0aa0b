"""The adapter that turns one model nearly into another."""

from __future__ import annotations

from loratools.ops.extract.report import ExtractReport
from loratools.pages.parts.contents import Contents, table, tables, warnings
from loratools.report.extraction import extract_facts, extract_plan_facts
from loratools.report.fields import Field, percent, text_field
from loratools.report.text import shape, size

_MODULES = (
    text_field("name", "module"),
    Field("shape", "shape", shape),
    Field("rank", "rank", str),
    Field("energy", "energy", "{:.4%}".format),
    Field("error", "error"),
    Field("gap_bound", "energy missed at most", "{:.1g}".format),
    Field("gap_estimate", "energy missed, estimated", "{:.1g}".format),
    Field("norm", "norm"),
    Field("identical", "identical weights", percent),
    Field("noise_edge", "noise edge"),
    Field("quantization_error", "error of quantisation"),
)
_REPLACED = (
    text_field("name", "tensor"),
    text_field("declared", "kept as"),
    Field("shape", "shape", shape),
    Field("bytes", "size", size),
    Field("norm", "norm of the change"),
    Field("share", "share of all that changed", percent),
)
_SKIPPED = (
    text_field("name", "tensor"),
    text_field("why", "reason"),
    Field("norm", "norm of the change"),
    Field("share", "share of all that changed", percent),
)


def contents(report: ExtractReport) -> Contents:
    """Return what the page of an extraction, or of its plan, shows."""
    planned = report.output is None
    facts = extract_plan_facts(report, "") if planned else extract_facts(report)
    if planned:
        facts = [(word, text.strip()) for word, text in facts]
    else:
        facts.append(("written", f"{report.output}  {size(report.bytes or 0)}"))
    return Contents(
        title="Plan: an extracted adapter" if planned else f"Adapter extracted to {report.output}",
        facts=tuple(facts),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Modules", _MODULES, report.rows()),
            table("Tensors kept in full", _REPLACED, [vars(replaced) for replaced in report.replacements]),
            table("Changed, and not in the adapter", _SKIPPED, [vars(skipped) for skipped in report.skipped]),
        ),
    )
