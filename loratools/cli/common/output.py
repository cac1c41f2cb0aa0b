"""The one sink: data to stdout, what is for people to stderr, and nothing but one JSON document with `--json`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import StringIO
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

import click

from loratools._version import __version__
from loratools.cli.common.page_file import PageFile
from loratools.cli.common.plot_file import PlotFile, Plotted
from loratools.errors import LoraToolsError
from loratools.report.text import ascii_only, safe

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

SCHEMA_VERSION = 1
# The bars that are drawn now: a terminal has room for one such display.
_bars: Progress | None = None
# Where nobody looks at a terminal's width (a pipe, a file), lines are as long as they have to be.
_UNBOUNDED = 1000
# Below this a name per line is left of a table; a terminal that says less (0, in some) is not believed.
_NARROWEST = 20
# More details than this scroll the message itself off the screen; `-v` and `--json` give them all.
_SHOWN_DETAILS = 10


class ProgressBar:
    """A bar on a terminal: called with the bytes just done, and told how many there will be."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def __call__(self, advance: int, /) -> None:
        self._bars.advance(self._task, advance)

    def expect(self, total: int) -> None:
        self._bars.update(self._task, total=total)


class Output(NamedTuple):
    """What a command was asked to print: given to it as `output` by `_options.common`."""

    verb: str
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    page: PageFile | None = None
    plot_file: PlotFile | None = None

    def plot(self, report: Plotted) -> None:
        """Draw the report as the picture of `--plot`, where that was asked for, and print where it is."""
        if self.plot_file is not None:
            for note in self.plot_file.write(report):
                self.warn(note)
            if not self.quiet:
                print_line(sys.stderr, f"picture  {safe(str(self.plot_file.path))}")

    def html(self, report: object) -> None:
        """Write the report as the page of `--html`, where that was asked for."""
        if self.page is not None:
            self.page.write(report)

    def document(self, body: Mapping[str, object], error: LoraToolsError | None = None) -> None:
        """Print the one JSON document of `--json`. Numbers that are not finite become null.

        `error`: an error that leaves something to report; `fail` must follow.
        """
        print_document(self.verb, {**body, "error": error_json(error)} if error is not None else body)

    def fail(self, error: LoraToolsError) -> NoReturn:
        """Print the error and exit with its code, after what there was to report has been printed."""
        print_error(error)
        raise click.exceptions.Exit(error.exit_code)

    def table(self, *renderables: RenderableType) -> None:
        """Print what was asked for, on stdout."""
        print_rich(sys.stdout, *renderables)

    def text(self, text: str) -> None:
        """Print text of our own that was asked for, on stdout, as it is."""
        print_line(sys.stdout, text.rstrip("\n"))

    def summary(self, *renderables: RenderableType) -> None:
        """Tell how it went, on stderr."""
        if not self.quiet:
            print_rich(sys.stderr, *renderables)

    def explain(self, text: str) -> None:
        """Tell one line that only `-v` asks for, on stderr."""
        if self.verbose and not self.quiet:
            print_line(sys.stderr, safe(text))

    def warn(self, text: str) -> None:
        if not self.quiet:
            print_line(sys.stderr, safe(text), label="warning", colour="yellow")

    @contextmanager
    def progress(self, total: int | None, description: str, *, files: bool = False) -> Iterator[ProgressBar | None]:
        """A bar of bytes with rate and time left, on a terminal; yields what to call with the bytes just done.

        `total`: None if the verb itself will tell, once it has read the headers. `files`: it counts files. Yields None
        if there is nobody to watch: a pipe, a file, `-q`.
        """
        global _bars
        if self.quiet or not animated(sys.stderr):
            yield None
            return
        if _bars is not None:  # what is done within another work has its bar below that one's
            task = _bars.add_task(safe(description), total=total)
            try:
                yield ProgressBar(_bars, task)
            finally:
                _bars.remove_task(task)
            return
        # Imported here: half of the start-up time of a short verb.
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            *((MofNCompleteColumn(),) if files else (DownloadColumn(), TransferSpeedColumn())),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=console(sys.stderr), transient=True, expand=True) as bars:
            _bars = bars
            try:
                yield ProgressBar(bars, bars.add_task(safe(description), total=total))
            finally:
                _bars = None


def animated(stream: TextIO) -> bool:
    """Whether text on `stream` may move: a terminal that knows how to."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    return animated(stream) and not os.environ.get("NO_COLOR")


def narrow(stream: TextIO) -> bool:
    """Whether `stream` cannot show our typographic characters."""
    try:
        "×…–→".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def console(stream: TextIO, *, on: TextIO | None = None) -> Console:
    """A rich console for `stream`, never reading markup or guessing highlights: names come from files.

    `on`: where it writes instead, in the width and the colours of `stream`.
    """
    from rich.console import Console

    return Console(
        file=on or stream,
        width=_width(stream),
        force_terminal=animated(stream),
        no_color=not coloured(stream),
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


def _width(stream: TextIO) -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return max(int(columns), _NARROWEST)
    if not stream.isatty():
        return _UNBOUNDED
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, _NARROWEST)
    except OSError:
        return 80


def print_rich(stream: TextIO, *renderables: RenderableType) -> None:
    # Rich would draw other boxes for an ASCII terminal, and knows nothing of the other characters: it draws in full,
    # and one place translates.
    drawn = StringIO()
    out = console(stream, on=drawn)
    for renderable in renderables:
        out.print(renderable)
    # Rich pads lines to the width of the table; trailing blanks are noise in a file.
    text = "\n".join(line.rstrip() for line in drawn.getvalue().split("\n"))
    _write(stream, ascii_only(text) if narrow(stream) else text)


def print_line(stream: TextIO, text: str, *, label: str = "", colour: str = "") -> None:
    """One line, not wrapped, after a coloured label. `text` must be safe already."""
    if label:
        start = f"{label}:"
        text = f"{click.style(start, fg=colour, bold=True) if coloured(stream) else start} {text}"
    _write(stream, (ascii_only(text) if narrow(stream) else text) + "\n")


def _write(stream: TextIO, text: str) -> None:
    """Write `text`. A stderr that cannot be written to (a full disk) does not stop the work."""
    try:
        stream.write(text)
        if stream is sys.stderr:
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError:
        if stream is not sys.stderr:
            raise
        # What is still buffered goes nowhere: the interpreter would try again at its end, and change the exit code.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def print_error(error: LoraToolsError, *, details: int = _SHOWN_DETAILS) -> None:
    """Print the error on stderr, with at most `details` of its details."""
    print_line(sys.stderr, safe(error.message), label="error", colour="red")
    for line in error.details[:details]:
        print_line(sys.stderr, f"  {safe(line)}")
    if len(error.details) > details:
        print_line(sys.stderr, f"  … and {len(error.details) - details:,} more")
    if error.hint:
        print_line(sys.stderr, safe(error.hint), label="hint", colour="cyan")


def error_json(error: LoraToolsError) -> dict[str, object]:
    """The `error` member of a JSON document."""
    return {"code": error.code, "message": error.message, "hint": error.hint, "details": list(error.details)}


def print_document(verb: str | None, body: Mapping[str, object]) -> None:
    import json

    head = {"loratools": __version__, "schema_version": SCHEMA_VERSION, "verb": verb}
    # ASCII with escapes: the same bytes whatever the terminal's encoding, and nothing in it that a terminal obeys.
    sys.stdout.write(json.dumps(_finite({**head, **body}), indent=2, allow_nan=False) + "\n")


def _finite(value: object) -> object:
    """`value` for JSON, which has no spelling for numbers that are not finite."""
    match value:
        case float():
            return value if value - value == 0 else None
        case dict():
            return {str(k): _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)
