"""A list of adapters for people: a row for each, then the warnings, the duplicates, and what is no adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.charts.labels import common_folder
from loratools.ops.listing.rows import ListedAdapter, ListReport
from loratools.report.fields import NOTHING
from loratools.report.rows import Column, Rows
from loratools.report.text import number, plural, safe, size
from loratools.short_repr import clipped

_USUAL = (
    "name", "family", "base_model", "revision", "kind", "modules", "rank", "alpha", "scale", "dtype", "parameters",
    "bytes", "title", "trigger_words", "date", "warnings",
)  # fmt: skip
_NUMERIC = frozenset({"modules", "rank", "alpha", "scale", "parameters", "bytes", "date", "modified", "warnings"})
# What goes first where there is no room.
_SPARE = {
    "revision": 8, "alpha": 7, "scale": 7, "parameters": 6, "modules": 5, "warnings": 5, "date": 4, "dtype": 3,
    "title": 2, "trigger_words": 1,
}  # fmt: skip
_HEADS = {"base_model": "base model", "trigger_words": "trigger words", "bytes": "size"}
_LONGEST = 40
# As git shortens the name of a commit.
_SHORT_REVISION = 8


def listing_tables(report: ListReport, columns: Sequence[str] | None) -> list[RenderableType]:
    """Blocks to print one after the other.

    Args:
        report: The list.
        columns: Names of the columns; the usual ones that say something if None.
    """
    blocks = table_of(report.adapters, columns) if report.adapters else []
    for group in report.duplicates:
        likeness = "the same file" if group.how == "file" else "the same update, up to rounding"
        blocks += ["", Text(f"{likeness}:"), *(Text(f"  {safe(path)}") for path in group.paths)]
    return blocks


def table_of(adapters: Sequence[ListedAdapter], columns: Sequence[str] | None = None) -> list[RenderableType]:
    """A row for each adapter, by its path below the folder that all are in; that folder stands above them once."""
    if columns is not None:
        return [_table(adapters, columns, None)]
    folder = common_folder([adapter.path for adapter in adapters])
    head = [Text(safe(folder), style="bold", overflow="fold")] if folder else []
    return [*head, _table(adapters, None, folder)]


def _table(adapters: Sequence[ListedAdapter], columns: Sequence[str] | None, folder: str | None) -> Rows:
    cells = {name: [_cell(adapter, name, folder) for adapter in adapters] for name in columns or _USUAL}
    if columns is None:
        cells = {name: column for name, column in cells.items() if name == "name" or any(column)}
    shown = [
        Column(
            _HEADS.get(name, name),
            [text or NOTHING for text in column],
            numeric=name in _NUMERIC,
            spare=_SPARE.get(name, 0) if columns is None else 0,
        )
        for name, column in cells.items()
    ]
    return Rows(shown, ruled=True)


def _cell(adapter: ListedAdapter, column: str, folder: str | None) -> str:
    """A cell as text; empty if there is nothing to say. Below a folder, which may be none, the name is the path."""
    if column == "name":
        # The folders of a cache say nothing but the name of the repository.
        by_name = folder is None or adapter.revision is not None
        return safe(adapter.name if by_name else adapter.path[len(folder or "") :] or ".")
    if column == "kind" and adapter.error is not None:
        return "cannot be read"
    if column == "revision":
        return safe((adapter.revision or "")[:_SHORT_REVISION])
    value = getattr(adapter, column)
    if value is None or value == ():
        return ""
    if column == "bytes":
        return size(value)
    if column == "warnings":
        return f"{len(value):,}" if value else ""
    if column in ("alpha", "scale"):
        return number(value)
    if column == "rank" and len(adapter.ranks) > 1:
        return f"{min(rank for rank, _ in adapter.ranks)}–{value}"
    if isinstance(value, int):
        return f"{value:,}"
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    # The path is what a row is called by, and what people copy; a family may be several models, which all are named.
    return safe(text if column in ("path", "family") else clipped(text, _LONGEST))


def others_lines(report: ListReport, *, every: bool) -> Iterator[RenderableType]:
    """How many were listed, what could not be read and why, and what is no adapter.

    Args:
        report: The list.
        every: Name everything, in place of counts.
    """
    failed = [adapter for adapter in report.adapters if adapter.error is not None]
    warned = [adapter for adapter in report.adapters if adapter.warnings]
    counts = [plural(len(report.adapters) - len(failed), "adapter")]
    counts += [f"{report.hidden:,} more that the condition leaves out"] if report.hidden else []
    counts += [f"{len(failed):,} that cannot be read"] if failed else []
    counts += [f"{len(warned):,} with warnings, which -v shows"] if warned and not every else []
    yield Text(", ".join(counts))
    yield from (Text(safe(f"error: {a.path}: {a.error}"), style="red", overflow="fold") for a in failed)
    if report.not_compared:
        count = plural(len(report.not_compared), "adapter")
        why = "not compared by values: updates that depend on a base, replaced weights, or damaged values"
        names = f": {', '.join(report.not_compared)}" if every else ""
        yield Text(safe(f"{count} {why}{names}"), overflow="fold")
    if every:
        for adapter in warned:
            yield from (Text(safe(f"warning: {adapter.path}: {w}"), overflow="fold") for w in adapter.warnings)
        yield from (Text(safe(f"not listed: {o.path} ({o.what})"), overflow="fold") for o in report.others)
    elif report.others:
        kinds = Counter(
            "another path to a listed file" if o.what.startswith("the same file") else o.what for o in report.others
        )
        listed = ", ".join(f"{safe(reason)} ({count:,})" for reason, count in kinds.most_common())
        yield Text(f"not listed: {listed}; -v names each", overflow="fold")
