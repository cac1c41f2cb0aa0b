"""Writing a report as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratools.arguments import checked
from loratools.errors import UsageError
from loratools.storage.commit import check_output, staged_file
from loratools.storage.files import quoted
from loratools.storage.json_file import write_new
from loratools.storage.ownership import PAGE_SUFFIXES


def check_page(file: Path, *, overwrite: bool) -> None:
    """Check, before any work, that the page may be written.

    Raises:
        UsageError: The name does not end in `.html`, or Jinja2 is not installed.
        OutputExistsError: The file exists and `overwrite` is False, or loratools did not write it.
    """
    if file.suffix.lower() not in PAGE_SUFFIXES:
        raise UsageError(f"{quoted(file)} is not the name of a page", hint=f"write {file.name}.html")
    # Imported here and not when the page is written, which may be hours later.
    import jinja2  # noqa: F401

    check_output(file, overwrite=overwrite, inputs=())


@checked
def write_page(report: object, file: str | Path, *, overwrite: bool = False) -> Path:
    """Write a report, or the description of an adapter, as one self-contained HTML page.

    The page loads nothing from the network. Its tables can be sorted and filtered.

    Args:
        report: The result of a verb, or an adapter.
        file: The file to write. Its name ends in `.html`.
        overwrite: Replace a page that loratools wrote.

    Returns:
        The path of the page.

    Raises:
        UsageError: `report` is not a report or an adapter, or the name does not end in `.html`.
        OutputExistsError: The file exists and `overwrite` is False, or loratools did not write it.
        MachineError: The disk is full, permission is missing, or Jinja2 is not installed.

    Example:
        >>> import loratools
        >>> report = loratools.inspect("fixtures/llama-tiny-science")
        >>> loratools.write_page(report, "science.html").name
        'science.html'
    """
    write_page_of_command(report, Path(file), overwrite=overwrite, arguments=None)
    return Path(file)


def write_page_of_command(report: object, file: Path, *, overwrite: bool, arguments: Sequence[str] | None) -> None:
    """Write the page, which quotes the command line with these arguments."""
    check_page(file, overwrite=overwrite)
    from loratools.pages.parts.about import about
    from loratools.pages.parts.dispatch import contents_of
    from loratools.pages.parts.rendering import page

    text = page(contents_of(report), about(arguments))
    with staged_file(file, overwrite=overwrite, inputs=()) as staged:
        write_new(staged, text.encode("utf-8"))
