"""What of a report's rows is shown, and how: the one description from which terminal tables and pages are made.

The rows are those of `report.rows()`, which are also the rows of the JSON document and of a data frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from loratools.report.text import number, safe

NOTHING = "–"


class Field(NamedTuple):
    """A column of a table by the key that its values have in each row.

    Attributes:
        key: The key of the rows.
        head: What stands above the column.
        spell: How a value that is not None is written for people.
        numeric: Whether the values are numbers, which are aligned at the right and sorted by size.
        spare: On a terminal, columns with the highest go first where there is no room for all; those with 0 stay.
        below: On a terminal without room, the cells get lines of their own below their rows.
    """

    key: str
    head: str
    spell: Callable[[Any], str] = number
    numeric: bool = True
    spare: int = 0
    below: bool = False

    def text(self, row: Mapping[str, object]) -> str:
        """Return the cell of a row, safe to print; a dash where there is no value."""
        value = row.get(self.key)
        return NOTHING if value is None or value in ((), [], "") else self.spell(value)


def text_field(key: str, head: str | None = None, *, spare: int = 0, below: bool = False) -> Field:
    """Return the field of names, words or lists of them."""
    return Field(key, head if head is not None else key.replace("_", " "), words, False, spare, below)


def filled(fields: Sequence[Field], rows: Sequence[Mapping[str, object]]) -> tuple[Field, ...]:
    """Return the fields for which at least one row has a value."""
    return tuple(field for field in fields if any(field.text(row) != NOTHING for row in rows))


def words(value: object) -> str:
    """Return a name, or a list of names with commas between them, safe to print."""
    return safe(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def integer(value: int) -> str:
    """Return a count: `1,024`."""
    return f"{value:,}"


def short(value: float) -> str:
    """Return a number with four significant digits, and 0 for what is only rounding: `0.9987`."""
    return "0" if abs(value) < 5e-7 else f"{value:.4g}"


def percent(value: float) -> str:
    """Return a share: `99.87 %`."""
    return f"{value:.2%}"


def several(values: Sequence[float | None]) -> str:
    """Return numbers with commas between them: `1, 0.5`."""
    return ", ".join(NOTHING if value is None else number(value) for value in values)
