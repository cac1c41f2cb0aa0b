"""A summary of a few lines: a word, and what there is to say of it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from loratools.report.text import safe


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without lines; texts are escaped."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for word, text in rows:
        table.add_row(word, Text(safe(text)))
    return table
