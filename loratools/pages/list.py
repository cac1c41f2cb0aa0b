"""The adapters below some folders."""

from __future__ import annotations

from collections import Counter

from loratools.charts.labels import common_folder
from loratools.ops.listing.rows import ListedAdapter, ListReport
from loratools.pages.parts.contents import Contents, Remark, table, tables
from loratools.report.fields import Field, integer, text_field
from loratools.report.text import number, plural, size

_ADAPTERS = (
    text_field("place", "adapter"),
    text_field("family"),
    text_field("base_model", "base model"),
    text_field("revision"),
    text_field("kind"),
    Field("modules", "modules", integer),
    Field("rank", "rank", integer),
    Field("alpha", "alpha", number),
    Field("scale", "scale", number),
    text_field("dtype"),
    Field("parameters", "parameters", integer),
    Field("bytes", "size", size),
    text_field("title"),
    text_field("trigger_words", "trigger words"),
    text_field("date"),
    text_field("format"),
    text_field("modified"),
    text_field("warnings"),
)
_DUPLICATES = (Field("group", "group", integer), text_field("how", "alike"), text_field("path", "adapter"))
_OTHERS = (text_field("path"), text_field("what"))
_LIKENESSES = {"file": "the same file", "values": "the same update, up to rounding"}


def contents(report: ListReport) -> Contents:
    """Return what the page of a list shows."""
    folder = common_folder([adapter.path for adapter in report.adapters])
    failed = [adapter for adapter in report.adapters if adapter.error is not None]
    facts = [("adapters", f"{len(report.adapters) - len(failed):,}")]
    facts += [("folder", folder)] if folder else []
    facts += [("left out", f"{report.hidden:,} by the condition")] if report.hidden else []
    facts += [("not listed", _other_kinds(report))] if report.others else []
    remarks = [Remark("error", f"{adapter.path}: {adapter.error}") for adapter in failed]
    if report.not_compared:
        count = plural(len(report.not_compared), "adapter")
        remarks.append(Remark("note", f"{count} not compared by values: {', '.join(report.not_compared)}"))
    duplicates = [
        {"group": i + 1, "how": _LIKENESSES.get(group.how, group.how), "path": path}
        for i, group in enumerate(report.duplicates)
        for path in group.paths
    ]
    return Contents(
        title=f"{plural(len(report.adapters), 'adapter')}" + (f" in {folder}" if folder else ""),
        facts=tuple(facts),
        remarks=tuple(remarks),
        tables=tables(
            table("Adapters", _ADAPTERS, [_row(adapter, folder) for adapter in report.adapters]),
            table("Duplicates", _DUPLICATES, duplicates),
            table("Not listed", _OTHERS, [vars(other) for other in report.others]),
        ),
    )


def _row(adapter: ListedAdapter, folder: str) -> dict[str, object]:
    row = adapter.to_dict() | {"place": adapter.path[len(folder) :] or adapter.name}
    return row | {"kind": "cannot be read"} if adapter.error is not None else row


def _other_kinds(report: ListReport) -> str:
    kinds = Counter(
        "another path to a listed file" if other.what.startswith("the same file") else other.what
        for other in report.others
    )
    return ", ".join(f"{what} ({count:,})" for what, count in kinds.most_common())
