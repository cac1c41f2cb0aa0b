"""inspect: what is in an adapter or a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import INPUT, PRINTING, option, verb
from loratools.cli.common.output import Output
from loratools.errors import UsageError


@verb("inspect", short_help="Show what is in adapters and checkpoints.")
@click.argument("sources", type=options.SOURCE, nargs=-1, required=True, metavar="SOURCE...")
@option(INPUT, "--values", is_flag=True, help="Also read the values: norms, spectra, what is not finite or untrained.")
@option(
    PRINTING,
    "--modules",
    is_flag=True,
    help="Print a row for every module; without it, modules that are alike share a row.",
)
@options.from_format
@options.base
@options.rank_from
@options.expert_packing
@options.include
@options.exclude
@options.common
@options.sources
@options.plot
@options.html_alone
def command(sources: tuple[str, ...], *, values: bool, modules: bool, output: Output, **settings: Any) -> None:
    """Show what is in adapters and checkpoints: modules, ranks, scales, dtypes, replaced weights.

    Only headers are read, unless --values is given. Several sources are shown as a table with a row for each, and
    --modules shows each of them in full. A folder is searched with all its subfolders. For the folder of a training
    run, the output says which checkpoint the trainer recorded as the best. With --values, --plot draws where an adapter
    changes much, its rank there, and its singular values.

    \b
    Examples:
      loratools inspect my-lora
      loratools inspect my-lora --values --json
      loratools inspect my-lora --values --plot my-lora.svg
      loratools inspect runs/my-lora
    """
    from loratools.ops.inspect.verb import inspect

    if output.plot_file is not None and not values:
        raise UsageError("without its values there is nothing of an adapter to draw", hint="add --values")
    with output.progress(None, "reading") if values else nullcontext() as progress:
        inspection = inspect(*sources, values=values, progress=progress, **settings)
    output.html(inspection)
    output.plot(inspection)
    if output.json:
        output.document(inspection.to_dict(), error=inspection.error)
    else:
        from loratools.report.inspection import inspection_report

        output.table(*inspection_report(inspection, modules=modules, overview=len(inspection.sources) > 1))
    if (error := inspection.error) is not None:
        # With --json as details, else what is wrong with each has its place in the table.
        output.fail(error if output.json else type(error)(error.message))
