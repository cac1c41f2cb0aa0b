"""The picture of `--plot`: refused before the work where it may not be written, and written after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Arguments and options of verbs that name their inputs.
_INPUTS = ("source", "sources", "adapters", "base")


class Plotted(Protocol):
    """A report that can be drawn."""

    def plot(self) -> Figure:
        """Return a matplotlib figure of the report's charts."""
        ...


class PlotFile(NamedTuple):
    """Where the charts of a report go as a picture.

    Attributes:
        path: The file.
        overwrite: Whether a picture that loratools wrote may be replaced.
        inputs: The inputs of the command, which the file must not be or lie in.
    """

    path: Path
    overwrite: bool
    inputs: tuple[Path, ...]

    @classmethod
    def of(cls, path: Path, arguments: Mapping[str, object]) -> PlotFile:
        """The picture of a command with these arguments and options."""
        inputs = [Path(text) for name in _INPUTS for text in _texts(arguments.get(name))]
        return cls(path, bool(arguments["overwrite"]), tuple(inputs))

    def check(self) -> None:
        """Refuse what may not be written.

        Raises:
            UsageError: The suffix is none of a picture.
            OutputExistsError: The file is there, or is one of the inputs.
            UnsupportedError: Matplotlib is not installed.
        """
        from loratools.charts.plot_file import check_plot_file

        check_plot_file(self.path, overwrite=self.overwrite, inputs=self.inputs)

    def write(self, report: Plotted) -> tuple[str, ...]:
        """Draw the report, and return what a person should know about the picture."""
        from loratools.charts.plot_file import write_plot_file

        return write_plot_file(self.path, report.plot(), overwrite=self.overwrite, inputs=self.inputs)


def _texts(value: object) -> Iterator[str]:
    """The sources in the value of an argument: one, several, or pairs of a source and its weight."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield each if isinstance(each, str) else each.source
