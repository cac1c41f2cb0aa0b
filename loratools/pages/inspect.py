"""What is in adapters and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.ops.inspect.entries import AdapterEntry, CheckpointEntry, Entry, FailedEntry, InspectReport
from loratools.pages.parts.contents import Contents, Remark, Section, Table, table, tables
from loratools.report.fields import Field, integer, text_field
from loratools.report.inspection import (
    adapter_facts,
    adapter_remarks,
    best_checkpoint_text,
    checkpoint_facts,
    checkpoint_remarks,
    not_listed_text,
)
from loratools.report.text import plural, shape, size
from loratools.short_repr import clipped

# A page of more rows than this takes a browser seconds to lay out.
_MOST_ROWS = 20_000
# Of what a header says for people; a page of a book in a cell helps nobody.
_LONGEST_TEXT = 2_000

_MODULES = (
    text_field("name", "module"),
    text_field("kind"),
    Field("rank", "rank", integer),
    Field("alpha", "alpha"),
    text_field("alpha_source", "alpha from"),
    Field("scale", "scale"),
    Field("shape", "shape", shape),
    text_field("dtype"),
    Field("parameters", "parameters", integer),
    Field("norm", "norm"),
    Field("spectral_norm", "spectral norm"),
    Field("stable_rank", "stable rank"),
    Field("effective_rank", "effective rank"),
)
_TENSORS = (
    text_field("name", "tensor"),
    Field("shape", "shape", shape),
    text_field("dtype"),
    Field("parameters", "parameters", integer),
    Field("non_finite", "not finite", integer),
)
_SOURCES = (
    text_field("path", "source"),
    text_field("what"),
    text_field("base_model", "base model"),
    Field("modules", "modules", integer),
    Field("rank", "largest rank", integer),
    Field("parameters", "parameters", integer),
    Field("bytes", "size", size),
)
_METADATA = (text_field("key"), text_field("value"))


def contents(report: InspectReport | Entry) -> Contents:
    """Return what the page of an inspection shows: one source, or several with a table of all above them."""
    if not isinstance(report, InspectReport):
        report = InspectReport((report,))
    notes = [f"best: {best_checkpoint_text(run)}" for run in report.runs if run.best or run.error]
    notes += [f"not listed: {not_listed_text(each)}" for each in report.not_listed]
    remarks = tuple(Remark("note", note) for note in notes)
    if len(report.sources) == 1:
        section = _section(report.sources[0], _MOST_ROWS)
        return Contents(section.title, section.facts, (*section.remarks, *remarks), section.tables)
    sections = []
    rows_to_show = _MOST_ROWS
    for entry in report.sources:
        sections.append(_section(entry, rows_to_show))
        rows_to_show = max(0, rows_to_show - sum(len(each.rows) for each in sections[-1].tables))
    overview = table("Sources", _SOURCES, [_overview(entry) for entry in report.sources])
    return Contents(
        plural(len(report.sources), "source"), remarks=remarks, tables=tables(overview), sections=tuple(sections)
    )


def _section(entry: Entry, most: int) -> Section:
    match entry:
        case AdapterEntry():
            replaced = [tensor._asdict() for tensor in entry.replacements]
            shown = tables(
                table("Modules", _MODULES, entry.rows(), most=most),
                table("Replaced weights", _TENSORS, replaced),
                _metadata(entry),
            )
            return Section(entry.path, tuple(adapter_facts(entry)), _remarks(adapter_remarks(entry)), shown)
        case CheckpointEntry():
            shown = tables(table("Tensors", _TENSORS, entry.rows(), most=most))
            return Section(entry.path, tuple(checkpoint_facts(entry)), _remarks(checkpoint_remarks(entry)), shown)
        case FailedEntry():
            error = entry.error
            sentences = [error.message, *error.details, *([f"hint: {error.hint}"] if error.hint else [])]
            return Section(entry.path, remarks=tuple(Remark("error", sentence) for sentence in sentences))


def _remarks(pairs: Iterable[tuple[str, str]]) -> tuple[Remark, ...]:
    return tuple(
        Remark("warning", text) if level == "warning" else Remark("note", f"{level}: {text}") for level, text in pairs
    )


def _metadata(entry: AdapterEntry) -> Table | None:
    rows = [{"key": key, "value": clipped(str(value), _LONGEST_TEXT)} for key, value in entry.metadata.items()]
    return table("Metadata", _METADATA, rows)


def _overview(entry: Entry) -> dict[str, object]:
    match entry:
        case AdapterEntry():
            return {
                "path": entry.path,
                "what": f"{entry.format} adapter",
                "base_model": entry.base_model,
                "modules": len(entry.modules),
                "rank": max((m.rank for m in entry.modules if m.rank is not None), default=None),
                "parameters": entry.parameters,
                "bytes": entry.bytes,
            }
        case CheckpointEntry():
            what = f"{entry.layout} checkpoint"
            return {"path": entry.path, "what": what, "parameters": entry.parameters, "bytes": entry.bytes}
        case FailedEntry():
            return {"path": entry.path, "what": f"error ({entry.error.code})"}
