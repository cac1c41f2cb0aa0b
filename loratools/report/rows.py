"""A table that is whole at any width: names are never broken in mid-word and numbers never cut.

Where the columns do not fit, those that can be spared go, and then each row becomes a name with its facts below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from loratools.report.fields import NOTHING, Field

_GAP = 2
# A name may go on in the next line after one of these.
_AFTER = re.compile(r"[^./_\-:,]*[./_\-:,]+|[^./_\-:,]+")


class Column(NamedTuple):
    """A column of a table, and how it gives way where there is no room.

    `cells` are safe to print. `spare`: columns with the highest go first where there is no room for all; those with 0
    stay. `below`: without room, the cells get lines of their own below their rows.
    """

    head: str
    cells: Sequence[str]
    numeric: bool = True
    spare: int = 0
    below: bool = False


def columns(fields: Sequence[Field], rows: Sequence[Mapping[str, object]]) -> list[Column]:
    """Return the columns of a report's rows."""
    return [Column(f.head, [f.text(row) for row in rows], f.numeric, f.spare, f.below) for f in fields]


class Rows:
    """The columns as a table, or each row as the cell of the first column with the others below.

    Args:
        columns: The first has the names of the rows.
        ruled: Whether there is a line below the heads.
        bold: Numbers of rows that are bold.
    """

    def __init__(self, columns: Sequence[Column], *, ruled: bool = False, bold: Sequence[int] = ()) -> None:
        self.columns = columns
        self.ruled = ruled
        self.bold = frozenset(bold)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for spared in sorted({c.spare for c in self.columns}, reverse=True):
            columns = [c for c in self.columns if c.spare <= spared]
            widths = [_width(c) for c in columns]
            if sum(widths) + _GAP * (len(widths) - 1) <= options.max_width:
                yield self._table(columns, widths)
                return
        columns = [c for c in self.columns if not c.below]
        widths = [_width(c) for c in columns]
        if len(columns) < len(self.columns) and sum(widths) + _GAP * (len(widths) - 1) <= options.max_width:
            yield from self._lines(columns, widths, options.max_width)
            return
        yield from self._cards(options.max_width)

    def _table(self, columns: Sequence[Column], widths: Sequence[int]) -> Table:
        table = Table(
            box=SIMPLE_HEAD if self.ruled else None,
            border_style="dim",
            header_style="dim",
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP - 1 if self.ruled else _GAP, 0, 0),  # the box adds one
        )
        for column, width in zip(columns, widths, strict=True):
            # With the width given, rich need not measure every cell, which takes longer than to print it.
            table.add_column(column.head, justify="right" if column.numeric else "left", no_wrap=True, width=width)
        for i, row in enumerate(zip(*(c.cells for c in columns), strict=True)):
            table.add_row(*(Text(cell) for cell in row), style="bold" if i in self.bold else None)
        return table

    def _lines(self, columns: Sequence[Column], widths: Sequence[int], width: int) -> Iterator[Text]:
        def line(cells: Sequence[str]) -> str:
            padded = [
                " " * (w - cell_len(cell)) + cell if c.numeric else cell + " " * (w - cell_len(cell))
                for cell, c, w in zip(cells, columns, widths, strict=True)
            ]
            return (" " * _GAP).join(padded).rstrip()

        yield Text(line([c.head for c in columns]), style="dim")
        for i in range(len(columns[0].cells)):
            yield Text(line([c.cells[i] for c in columns]), style="bold" if i in self.bold else "")
            for below in (c for c in self.columns if c.below):
                yield from (Text(f"    {part}") for part in wrapped(f"{below.head} {below.cells[i]}", width - 4))

    def _cards(self, width: int) -> Iterator[Text]:
        name, *facts = self.columns
        for i, cell in enumerate(name.cells):
            title = f"{name.head} {cell}" if name.numeric else cell
            yield from (Text(line, style="bold") for line in wrapped(title, width))
            line = Text("  ")
            for fact in facts:
                if fact.cells[i] == NOTHING:
                    continue
                text = Text.assemble((fact.head.replace("\n", " ") + " ", "dim"), fact.cells[i])
                if len(line) > 2 and len(line) + len(text) > width:
                    yield line
                    line = Text("  ")
                if len(text) > width - 2:
                    yield from (Text(f"  {part}") for part in wrapped(text.plain, width - 2))
                    continue
                line.append_text(text).append("  ")
            if len(line) > 2:
                yield line


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at blanks, or in a longer name after a dot, slash or underscore."""
    lines = [""]
    for word in re.findall(r"\S+|\s+", text):
        if cell_len(lines[-1]) + cell_len(word) <= width:
            lines[-1] += word
        elif word.isspace():
            lines.append("")
        elif cell_len(word) <= width:
            lines.append(word)
        else:
            for part in _AFTER.findall(word):
                if lines[-1] and cell_len(lines[-1]) + cell_len(part) > width:
                    lines.append("")
                # A part without any place to go on is cut where the line ends.
                while cell_len(part) > width:
                    lines[-1], part = part[:width], part[width:]
                    lines.append("")
                lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()] or [""]


def _width(column: Column) -> int:
    return max(cell_len(line) for line in [*column.head.split("\n"), *column.cells])
