"""A list of adapters for people: a row for each, then the warnings, the duplicates, and what is no adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.charts.labels import common_folder
from loratools.ops.listing.rows import ListedAdapter, ListReport
from loratools.report.rows import Column, Rows
from loratools.report.text import number, plural, safe, size
from loratools.short_repr import clipped

_USUAL = ("name", "family", "base_model", "kind", "rank", "dtype", "bytes", "title", "trigger_words", "date")
_NUMERIC = frozenset({"modules", "rank", "alpha", "scale", "parameters", "bytes", "date", "modified"})
# What goes first where there is no room.
_SPARE = {"date": 4, "dtype": 3, "title": 2, "trigger_words": 1}
_HEADS = {"base_model": "base model", "trigger_words": "trigger words", "bytes": "size"}
_LONGEST = 40


def listing_tables(report: ListReport, columns: Sequence[str] | None) -> list[RenderableType]:
    """Blocks to print one after the other.

    Args:
        report: The list.
        columns: Names of the columns; the usual ones that say something if None.
    """
    blocks: list[RenderableType] = []
    folder = common_folder([adapter.path for adapter in report.adapters])
    if report.adapters:
        if folder and columns is None:
            blocks.append(Text(safe(folder), style="bold", overflow="fold"))
        blocks.append(_table(report.adapters, columns, folder if columns is None else ""))
    for group in report.duplicates:
        likeness = "the same file" if group.how == "file" else "the same update, up to rounding"
        blocks += ["", Text(f"{likeness}:"), *(Text(f"  {safe(path)}") for path in group.paths)]
    return blocks


def _table(adapters: Sequence[ListedAdapter], columns: Sequence[str] | None, folder: str) -> Rows:
    cells = {name: [_cell(adapter, name, folder) for adapter in adapters] for name in columns or _USUAL}
    if columns is None:
        cells = {name: column for name, column in cells.items() if name == "name" or any(column)}
    shown = [
        Column(
            _HEADS.get(name, name),
            [text or "–" for text in column],
            numeric=name in _NUMERIC,
            spare=_SPARE.get(name, 0) if columns is None else 0,
        )
        for name, column in cells.items()
    ]
    return Rows(shown, ruled=True)


def _cell(adapter: ListedAdapter, column: str, folder: str) -> str:
    """A cell as text; empty if there is nothing to say."""
    if column == "name":
        return safe(adapter.path[len(folder) :] if folder else adapter.name)
    if column == "kind" and adapter.error is not None:
        return "cannot be read"
    value = getattr(adapter, column)
    if value is None or value == ():
        return ""
    if column == "bytes":
        return size(value)
    if column == "warnings":
        return f"{len(value)}"
    if column in ("alpha", "scale"):
        return number(value)
    if column == "rank" and len(adapter.ranks) > 1:
        return f"{min(rank for rank, _ in adapter.ranks)}–{value}"
    if isinstance(value, int):
        return f"{value:,}"
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    # The path is what a row is called by, and what people copy.
    return safe(text if column == "path" else clipped(text, _LONGEST))


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
