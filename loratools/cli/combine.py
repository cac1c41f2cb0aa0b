"""combine: make one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools import registry
from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, OUTPUT, SELECTION, option, verb
from loratools.cli.common.killed_runs import warn_of_killed_runs
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import document_of, replaced_rows
from loratools.errors import UsageError


@verb("combine")
@click.argument("adapters", nargs=-1, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@option(OUTPUT, "-o", "--out", type=options.PATH, metavar="PATH", help="Where to write the result.")
@option(
    SELECTION,
    "--method",
    type=options.METHODS,
    metavar="NAME[,NAME...]",
    help=(
        f"The method; linear by default: {', '.join(registry.names('methods'))}. 'loratools methods NAME' "
        "explains one. Several, or 'all', are compared with --plan."
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
@options.card
@options.overwrite
@options.resume
@options.common
@options.sources
@options.plot
@options.html
def command(
    adapters: tuple[options.Weighted, ...],
    *,
    out: Path | None,
    method: tuple[str, ...] | None,
    plan: bool,
    overwrite: bool,
    resume: bool,
    output: Output,
    **settings: Any,
) -> None:
    """Write one adapter that does what the ADAPTERs do together, each times its weight W.

    The linear method without --rank or --energy loses nothing: ranks add up. With one of them, each module is cut to
    the nearest of that size. For each adapter, the summary prints its gain (how much of it is in the result: its
    weight, where nothing overlaps), its interference (how differently the result answers to the inputs that the adapter
    reacts to), and its overlap with the other adapters, next to what two random adapters of that size would have.
    --plan computes all of that and writes nothing; -v prints it for each module. With --plan, several methods can be
    named, or 'all': a table shows what each would do, the one with the smallest interference first. --plot draws gains,
    interferences and overlaps as bars, and where in the model they are.

    \b
    Examples:
      loratools combine style=0.7 facts=0.3 -o both
      loratools combine style facts -o both --rank 16
      loratools combine instruct chat=-0.5 -o less-chatty
      loratools combine a b c -o all --method ties --set density=0.3 --rank 16
      loratools combine a b c --method all --rank 16 --plan
      loratools combine style facts -o both --rank 16 --plan --plot both.svg
      loratools combine --recipe blend.yaml -o blend
    """
    sources = [(a.source, a.weight) for a in adapters]
    if method is not None and (len(method) > 1 or method == ("all",)):
        _compare(sources, method, plan=plan, output=output, settings={"out": out, "overwrite": overwrite, **settings})
        return
    if out is None:
        raise click.MissingParameter(param_type="option", param_hint="'-o' / '--out'")
    from loratools.ops.combine.verb import combine

    said_before = warn_of_killed_runs(output, out, plan=plan, resume=resume)
    with output.progress(None, "combining") as progress:
        report = combine(
            sources,
            out,
            method=method[0] if method else None,
            plan=plan,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            **settings,
        )
    output.html(report)
    output.plot(report)
    for warning in report.warnings:
        if warning not in said_before:
            output.warn(warning)
    if output.json:
        output.document(document_of(report, out, overwrite=overwrite, plan=plan))
        return
    from loratools.report.combination import combine_plan, combine_summary

    if plan:
        planned = combine_plan(report, out, residual=settings["residual"], every=output.verbose)
        output.table(*planned, *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*combine_summary(report, every=output.verbose))


def _compare(
    sources: list[tuple[str, float]], methods: tuple[str, ...], *, plan: bool, output: Output, settings: dict[str, Any]
) -> None:
    """Print what several methods would make of the adapters."""
    from loratools.ops.combine.side_by_side import compare_methods

    if not plan:
        raise UsageError(
            "several methods make several results, and nothing says which one to write",
            hint="add --plan to compare them, or name one method",
        )
    with output.progress(None, "combining") as progress:
        report = compare_methods(sources, methods, progress=progress, **settings)
    output.html(report)
    output.plot(report)
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        output.document(report.to_dict())
        return
    from loratools.report.methods_compared import methods_compared

    output.table(*methods_compared(report))
