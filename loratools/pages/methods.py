"""What several methods would make of the same adapters, side by side."""

from __future__ import annotations

from loratools.ops.combine.side_by_side import MethodsReport
from loratools.pages.parts.contents import Contents, Remark, table, tables, warnings
from loratools.report.combination import ADAPTER_FIELDS
from loratools.report.fields import Field, short, text_field
from loratools.report.text import plural, size

_METHOD = text_field("method")
_METHODS = (
    _METHOD,
    Field("interference", "largest interference", short),
    Field("error", "error", short),
    Field("rank", "rank", str),
    Field("bytes", "size", size),
    Field("seconds", "seconds", "{:.2g}".format),
)


def contents(report: MethodsReport) -> Contents:
    """Return what the page of a comparison of methods shows."""
    computed = [outcome.to_dict() for outcome in report.methods if outcome.refused is None]
    refused = [outcome for outcome in report.methods if outcome.refused is not None]
    return Contents(
        title=f"{plural(len(report.methods), 'method')} on the same adapters",
        remarks=(
            *warnings(report.warnings),
            *(Remark("note", f"{outcome.method}: {outcome.refused}") for outcome in refused),
        ),
        tables=tables(
            table("Methods", _METHODS, computed),
            table("Each adapter by each method", (_METHOD, *ADAPTER_FIELDS), report.rows()),
        ),
    )
