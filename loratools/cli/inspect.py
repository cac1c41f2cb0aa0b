"""inspect: what is in an adapter or a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from loratools.cli.common.options import SOURCE, base, common, from_format, rank_from
from loratools.cli.common.output import Output

if TYPE_CHECKING:
    from loratools.ops.common.arguments import RankFrom


@click.command("inspect", short_help="Show what is in adapters and checkpoints.")
@click.argument("sources", type=SOURCE, nargs=-1, required=True, metavar="SOURCE...")
@click.option("--values", is_flag=True, help="Also read the values: norms, spectra, what is not finite or untrained.")
@click.option("--modules", is_flag=True, help="A row for every module, in place of one for all that are alike.")
@from_format
@base
@rank_from
@common
def command(
    sources: tuple[str, ...],
    *,
    values: bool,
    modules: bool,
    from_format: str | None,
    base: str | None,
    rank_from: RankFrom,
    output: Output,
) -> None:
    """Show what is in adapters and checkpoints: modules, ranks, scales, dtypes, replaced weights.

    Only headers are read, unless --values is given. A folder of several adapters or checkpoints is listed.

    \b
    Examples:
      loratools inspect my-lora
      loratools inspect my-lora --values --json
    """
    from loratools.ops.inspect import inspect

    with output.progress(None, "reading") if values else nullcontext() as progress:
        inspection = inspect(
            *sources, values=values, from_format=from_format, base=base, rank_from=rank_from, progress=progress
        )
    if output.json:
        output.document(inspection.as_json(), error=inspection.error)
    else:
        from loratools.report.inspection import inspection_report

        overview = len(inspection.sources) > len(sources)
        output.table(*inspection_report(inspection, modules=modules, overview=overview))
    if inspection.error is not None:
        output.fail(inspection.error)
