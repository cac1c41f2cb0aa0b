"""What is drawn on a terminal alone: a pipe or a file gets what it got before there were pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console, ConsoleOptions, RenderableType


class OnTerminal:
    """Blocks that are made and shown on a terminal alone.

    Args:
        blocks: What makes them; it is called only where they are shown.
        otherwise: What is shown elsewhere.
    """

    def __init__(
        self, blocks: Callable[[], Iterable[RenderableType]], otherwise: Iterable[RenderableType] = ()
    ) -> None:
        self._blocks = blocks
        self._otherwise = otherwise

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        yield from self._blocks() if console.is_terminal else self._otherwise


def has_colours(console: Console) -> bool:
    """Whether shades of a colour can be told apart: not where colours are refused, or are the sixteen of old."""
    return not console.no_color and console.color_system in ("256", "truecolor")
