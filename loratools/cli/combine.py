"""combine: make one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools import registry
from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, OUTPUT, SELECTION, option, verb
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import replaced_rows, with_replaced


@verb("combine")
@click.argument("adapters", nargs=-1, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@options.out
@option(
    SELECTION,
    "--method",
    type=options.METHOD,
    metavar="NAME",
    help=(
        f"The method, linear where none is given: {', '.join(registry.names('methods'))}. 'loratools methods NAME' "
        "explains one."
    ),
)
@option(
    SELECTION,
    "--set",
    "options",
    multiple=True,
    type=options.SETTING,
    callback=options.as_mapping,
    metavar="OPTION=VALUE",
    help="An option of the method.",
)
@options.rank
@options.energy
@options.max_rank
@option(
    INPUT,
    "--module-weight",
    "module_weights",
    multiple=True,
    type=options.MODULE_WEIGHT,
    callback=options.as_mapping,
    metavar="GLOB=W[,W...]",
    help=(
        "Multiply the weight in modules whose names match: one number for all adapters, or one for each; the last "
        "match counts."
    ),
)
@option(
    INPUT,
    "--block-weights",
    multiple=True,
    type=options.NUMBERS,
    metavar="W,W,...",
    help="Block weights as kohya's scripts take them: 12, 17, 20 or 26 numbers, for all adapters or for each.",
)
@option(
    SELECTION,
    "--heads",
    type=click.Choice(["refuse", "first", "average"]),
    help="What to do where adapters replace a weight with different values.  [default: refuse]",
)
@option(
    SELECTION,
    "--calibrate",
    type=click.Choice(["svc"]),
    help="Rescale singular values that several adapters share (svc).",
)
@option(
    SELECTION,
    "--norm-match",
    is_flag=True,
    help="Scale each module to the sum of the weighted norms of its adapters.",
)
@option(
    OUTPUT,
    "--residual",
    type=options.PATH,
    metavar="PATH",
    help="Also write what was lost to PATH, as another adapter.",
)
@option(
    INPUT,
    "--recipe",
    type=options.PATH,
    metavar="FILE",
    help="A YAML file with adapters, method and settings; see docs/recipes.md.",
)
@option(EXECUTION, "--seed", type=int, metavar="N", help="Random seed.  [default: 0]")
@options.dtype
@options.include
@options.exclude
@options.from_format
@options.output_format
@options.base
@options.rank_from
@options.expert_packing
@options.threads
@options.plan
@options.overwrite
@options.common
def command(
    adapters: tuple[options.Weighted, ...],
    *,
    out: Path,
    plan: bool,
    overwrite: bool,
    output: Output,
    **settings: Any,
) -> None:
    """Write one adapter that does what the ADAPTERs do together, each times its weight W.

    The linear method without --rank or --energy loses nothing: ranks add up. With one of them, each module is cut to
    the nearest of that size. For each adapter, the summary prints its gain (how much of it is in the result: its
    weight, where nothing overlaps), its interference (how differently the result answers to the inputs that the adapter
    reacts to), and its overlap with the other adapters, next to what two random adapters of that size would have.
    --plan computes all of that and writes nothing; -v prints it for each module.

    \b
    Examples:
      loratools combine style=0.7 facts=0.3 -o both
      loratools combine style facts -o both --rank 16
      loratools combine instruct chat=-0.5 -o less-chatty
      loratools combine a b c -o all --method ties --set density=0.3 --rank 16
      loratools combine --recipe blend.yaml -o blend
    """
    from loratools.ops.combine.verb import combine

    with output.progress(None, "combining") as progress:
        report = combine(
            [(a.source, a.weight) for a in adapters],
            out,
            plan=plan,
            overwrite=overwrite,
            progress=progress,
            **settings,
        )
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        document = report.to_dict()
        output.document(with_replaced(document, out, overwrite=overwrite) if plan else document)
        return
    from loratools.report.combination import combine_plan, combine_summary

    if plan:
        planned = combine_plan(report, out, residual=settings["residual"], every=output.verbose)
        output.table(*planned, *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*combine_summary(report, every=output.verbose))
