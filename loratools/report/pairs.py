"""A summary of a few lines: a word, and what there is to say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions
from rich.text import Text

from loratools.report.rows import wrapped
from loratools.report.text import safe

_GAP = 2


def pairs(rows: Iterable[tuple[str, str]]) -> Pairs:
    """Two columns without lines; texts are escaped."""
    return Pairs([(word, safe(text)) for word, text in rows])


class Pairs:
    """The words in one column, and beside each its text, in as many lines as it needs."""

    def __init__(self, rows: list[tuple[str, str]]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        indent = max((len(word) for word, _ in self.rows), default=0) + _GAP
        for word, text in self.rows:
            first, *more = wrapped(text, max(options.max_width - indent, 1))
            yield Text.assemble((word.ljust(indent), "bold"), first)
            yield from (Text(" " * indent + line) for line in more)
