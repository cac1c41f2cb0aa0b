"""What a page shows, as values: knows nothing of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loratools.charts.values import Chart
from loratools.report.fields import Field, filled

Level: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Remark:
    """A sentence that a person should not miss.

    Attributes:
        level: How grave it is: `error`, `warning` or `note`.
        text: The sentence.
    """

    level: Level
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of a report, shown by some of their keys.

    Attributes:
        title: What the rows are.
        fields: The columns.
        rows: The rows, as `report.rows()` gives them.
        omitted: How many rows of the report are not among them, because a page is for reading.
    """

    title: str
    fields: tuple[Field, ...]
    rows: tuple[Mapping[str, object], ...]
    omitted: int = 0


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading of its own.

    Attributes:
        title: The heading.
        facts: Pairs of a word and what there is to say of it.
        remarks: What a person should know.
        tables: Tables of rows.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    remarks: tuple[Remark, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What the page of a report shows: its heading, what there is to say of the whole, and its parts.

    Attributes:
        title: What was done, to what.
        facts: Pairs of a word and what there is to say of it.
        remarks: Warnings and findings.
        tables: Tables of rows.
        charts: Pictures.
        sections: Parts with headings of their own.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    remarks: tuple[Remark, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    sections: tuple[Section, ...] = ()


def tables(*candidates: Table | None) -> tuple[Table, ...]:
    """Return the tables that have rows."""
    return tuple(table for table in candidates if table is not None and (table.rows or table.omitted))


def table(
    title: str, fields: Sequence[Field], rows: Sequence[Mapping[str, object]], *, most: int | None = None
) -> Table:
    """Return a table with those of the fields for which some row has a value.

    Args:
        title: What the rows are.
        fields: The columns that there may be.
        rows: The rows.
        most: How many rows are shown; all if None.
    """
    shown = tuple(rows if most is None else rows[:most])
    return Table(title, filled(fields, shown), shown, omitted=len(rows) - len(shown))


def warnings(texts: Sequence[str]) -> tuple[Remark, ...]:
    """Return warnings as remarks."""
    return tuple(Remark("warning", text) for text in texts)
