"""Charts as a file: PNG, SVG or PDF by its suffix, complete or not at all, the same bytes for the same charts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._version import __version__
from loratools.charts.values import Chart
from loratools.errors import InputError, UnsupportedError, UsageError
from loratools.storage.commit import check_output, staged_file
from loratools.storage.files import quoted
from loratools.storage.json_file import write_new
from loratools.storage.ownership import MARK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# What each kind of file says of itself: who wrote it, and nothing of when.
_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {MARK: __version__},
    ".svg": {"Creator": f"{MARK} {__version__}", "Date": None},
    ".pdf": {"Creator": f"{MARK} {__version__}", "CreationDate": None},
}


def check_plot_file(path: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Check, before any work, that charts can be written to this file.

    Args:
        path: The file.
        overwrite: Whether a picture that loratools wrote may be replaced.
        inputs: What the file must not be or lie in.

    Raises:
        UsageError: The suffix is none of a picture.
        OutputExistsError: The file is there, or is one of the inputs.
        UnsupportedError: Matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{quoted(path)} has no suffix of a picture",
            hint=f"give it one of these: {', '.join(SUFFIXES)}",
        )
    check_output(path, overwrite=overwrite, inputs=inputs)
    require_matplotlib()


def write_plot_file(path: Path, drawn: Figure, *, overwrite: bool, inputs: Sequence[Path]) -> tuple[str, ...]:
    """Write a figure to a file, and return what a person should know about it.

    Args:
        path: The file, which `check_plot_file` has passed.
        drawn: The figure, as a report draws it.
        overwrite: Whether a picture that loratools wrote may be replaced.
        inputs: What the file must not be or lie in.

    Raises:
        OutputExistsError: The file is there meanwhile.
        MachineError: The disk is full, or there is no permission.
    """
    data, notes = picture_bytes(drawn, path.suffix.lower())
    with staged_file(path, overwrite=overwrite, inputs=inputs) as staged:
        write_new(staged, data)
    return notes


def figure(charts: Sequence[Chart], *, title: str = "") -> Figure:
    """Return a matplotlib figure with a panel for each chart.

    Raises:
        UnsupportedError: Matplotlib is not installed.
        InputError: There is no chart.
    """
    require_matplotlib()
    if not charts:
        raise InputError("there is nothing to draw: the report has no numbers by module")
    from loratools.charts.figure import figure_of

    return figure_of(charts, title=title)


def picture_bytes(drawn: Figure, suffix: str) -> tuple[bytes, tuple[str, ...]]:
    """Return a figure as the bytes of a file with this suffix, and what a person should know about it."""
    from loratools.charts.figure import fixed_settings

    buffer = BytesIO()
    with fixed_settings(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn.savefig(buffer, format=suffix[1:], metadata=_METADATA[suffix])
    glyphs = {str(each.message) for each in caught if "Glyph" in str(each.message)}
    for each in caught:
        if "Glyph" not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if not glyphs or suffix == ".svg":
        return buffer.getvalue(), ()
    characters = f"{len(glyphs)} character{'s' if len(glyphs) > 1 else ''} of the names"
    return buffer.getvalue(), (f"matplotlib's font has no sign for {characters}: .svg keeps them as text",)


def require_matplotlib() -> None:
    """Check that matplotlib can be imported.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "pictures are drawn with matplotlib, which is not installed", hint="pip install 'loratools[plot]'"
        ) from error
