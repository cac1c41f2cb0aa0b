"""verify: whether a merged model is its base plus its adapters, and nothing else."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, option, verb
from loratools.cli.common.output import Output


@verb("verify")
@click.argument("merged", type=options.SOURCE)
@click.argument("adapters", nargs=-1, required=True, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@option(INPUT, "--base", type=options.SOURCE, required=True, metavar="BASE", help="The model that it was merged from.")
@option(
    EXECUTION,
    "--sample",
    type=options.SHARE,
    metavar="F",
    help="Look at this share of the adapted weights only; the verdict is then at most undecided.",
)
@options.allow_partial
@options.include
@options.exclude
@options.from_format
@options.rank_from
@options.initial
@options.expert_packing
@options.expert_orientation
@options.threads
@options.common
def command(merged: str, adapters: tuple[options.Weighted, ...], *, base: str, output: Output, **settings: Any) -> None:
    """Tell whether MERGED is BASE with the ADAPTERs added, each times its weight W, and nothing else.

    Weights that no adapter changes are compared byte by byte. For the others it is told which known way of computing
    gives exactly their values, and so which program may have merged them; or what is wrong with them: not applied,
    scale ignored, transposed, another base, and so on. Ends with 0 if all is explained (same), with 1 if not
    (different), and with 3 if it cannot be decided.

    \b
    Examples:
      loratools verify merged --base llama-3-8b my-lora
      loratools verify merged --base llama-3-8b style=0.7 facts=0.3 --json
    """
    from loratools.ops.verify.verb import verify
    from loratools.report.verification import verification_tables

    with output.progress(None, "verifying") as progress:
        report = verify(merged, base, adapters, progress=progress, **settings)
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        output.document(report.to_dict())
    else:
        output.table(*verification_tables(report, every=output.verbose))
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)
