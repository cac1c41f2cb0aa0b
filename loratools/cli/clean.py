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
    """Remove what killed runs have left in FOLDER and below it, and list it with its size; the working folder if none.

    Each run prepares its output in a hidden folder beside it and holds a lock as long as it lives, so that a run that
    is alive loses nothing. What '--resume' could go on with is removed as well; --plan lists, and removes nothing.

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
