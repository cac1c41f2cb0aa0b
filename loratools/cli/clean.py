"""clean: remove what killed runs have left."""

from __future__ import annotations

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import verb
from loratools.cli.common.output import Output


@verb("clean")
@click.argument("folder", type=options.PATH, default=".")
@options.plan
@options.common
def command(folder: str, *, plan: bool, output: Output) -> None:
    """Remove the leftovers of killed runs in FOLDER and its subfolders, and list them with their sizes.

    FOLDER is the working folder by default. A run prepares its output in a hidden folder and holds a lock on it while
    it runs, so running jobs are not touched. Work that --resume could continue is removed as well. --plan lists
    everything and removes nothing.

    \b
    Examples:
      loratools clean
      loratools clean models --plan
    """
    from loratools.ops.clean import clean

    report = clean(folder, plan=plan)
    if output.json:
        output.document(report.to_dict(), error=report.error)
    else:
        from loratools.report.cleaning import cleaning_tables

        output.table(*cleaning_tables(report))
    if report.error is not None:
        output.fail(report.error)
