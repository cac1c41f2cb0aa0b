"""list: a row for every adapter below some folders."""

from __future__ import annotations

import csv
import io
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, PRINTING, SELECTION, option, verb
from loratools.cli.common.output import Output
from loratools.errors import UsageError


@verb("list", short_help="List the adapters below folders.")
@click.argument("folders", type=options.SOURCE, nargs=-1, required=True, metavar="FOLDER...")
@option(
    SELECTION,
    "--where",
    metavar="CONDITION",
    help="List only rows that meet a condition on columns: 'rank >= 32 and family = flux'. Comparisons are = != < <= "
    "> >= and ~ (a glob), joined by and, or, not and parentheses; sizes may be written as 200MB.",
)
@option(
    INPUT, "--duplicates", is_flag=True, help="Also look for adapters that are the same file, by SHA-256; reads files."
)
@option(
    INPUT,
    "--values",
    is_flag=True,
    help="With --duplicates, also look for adapters whose updates are the same under other names, formats and dtypes.",
)
@option(PRINTING, "--columns", metavar="A,B", help="The columns of the table, separated by commas.")
@option(PRINTING, "--sort", metavar="COLUMN", help="Sort by a column; -COLUMN from the largest to the smallest.")
@option(PRINTING, "--csv", "as_csv", is_flag=True, help="Print comma-separated values, with all columns.")
@option(
    EXECUTION,
    "--cache/--no-cache",
    default=True,
    help="Keep what was read in the user's cache folder, and read only what has changed since. This is the default.",
)
@options.threads
@options.common
@options.sources
@options.html_alone
def command(folders: tuple[str, ...], *, columns: str | None, as_csv: bool, output: Output, **settings: Any) -> None:
    """List the adapters below folders, a row for each: what it is for, its rank, size, title and trigger words.

    Only headers are read. Folders are searched with all their subfolders, and files that have not changed since the
    last time are not read again. Files that are not adapters are counted at the end; -v names them.

    \b
    Examples:
      loratools list ComfyUI/models/loras
      loratools list loras --where 'rank >= 32 and family = flux' --sort=-bytes
      loratools list loras --duplicates --values --columns name,rank,title
    """
    from loratools.ops.listing.verb import COLUMNS, list_adapters

    chosen = _chosen(columns, COLUMNS)
    if as_csv and output.json:
        raise UsageError("--csv and --json exclude each other", hint="give one of them")
    with output.progress(None, "reading headers", files=True) as progress:
        report = list_adapters(*folders, execution="forked", progress=progress, **settings)
    output.html(report)
    if output.json:
        output.document(report.to_dict())
        return
    if as_csv:
        output.text(_csv(report.adapters, chosen or list(COLUMNS)))
        return
    from loratools.report.listing import listing_tables, others_lines

    output.table(*listing_tables(report, chosen))
    output.summary(*others_lines(report, every=output.verbose))


def _chosen(columns: str | None, known: dict[str, type]) -> list[str] | None:
    if columns is None:
        return None
    names = [name.strip() for name in columns.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"there is no column '{unknown[0]}'", hint=f"columns are: {', '.join(known)}")
    if not names:
        raise UsageError("--columns names no column", hint=f"columns are: {', '.join(known)}")
    return names


def _csv(adapters: Any, columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for adapter in adapters:
        cells = (getattr(adapter, column) for column in columns)
        writer.writerow(
            ["; ".join(cell) if isinstance(cell, tuple) else "" if cell is None else cell for cell in cells]
        )
    return text.getvalue()
