"""The entries of a registry, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from loratools.report.text import safe


def entries_table(word: str, entries: Sequence[Mapping[str, object]]) -> Table:
    """One row per entry: its name, a mark per capability, its summary. `word` is what an entry is called."""
    marks = [key for key in (entries[0] if entries else {}) if key not in ("name", "summary")]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(word, style="bold", no_wrap=True)
    for mark in marks:
        table.add_column(mark, justify="center")
    table.add_column("summary", overflow="fold")
    for entry in entries:
        capable = [("yes" if entry[mark] else "–") for mark in marks]
        table.add_row(Text(safe(str(entry["name"]))), *capable, Text(safe(str(entry["summary"]))))
    return table


def methods_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """One row per method, and below it one per option with its default."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("summary, and what --set takes", overflow="fold")
    for entry in entries:
        table.add_row(Text(safe(entry["name"])), Text(safe(entry["summary"])))
        table.add_row("", Text(safe(entry["use"])))
        for option in entry["options"]:
            option_line = f"{option['name']}={option['default']}   {option['about']} ({option['range']})"
            table.add_row("", Text(safe(f"  {option_line}"), style="dim"))
    return table
