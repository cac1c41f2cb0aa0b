"""compare: how alike adapters are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import PRINTING, option, verb
from loratools.cli.common.output import Output
from loratools.errors import UsageError

if TYPE_CHECKING:
    from loratools.ops.compare.report import CompareReport


@verb("compare")
@click.argument("adapters", type=options.SOURCE, nargs=-1, required=True, metavar="ADAPTER ADAPTER...")
@options.include
@options.exclude
@options.from_format
@options.base
@options.rank_from
@options.expert_packing
@options.threads
@option(
    PRINTING,
    "--fail-below",
    type=click.FloatRange(-1, 1),
    metavar="F",
    help="End with exit code 1 where a cosine is below F, or cannot be computed.",
)
@options.common
@options.sources
@options.plot
@options.html_alone
def command(adapters: tuple[str, ...], *, fail_below: float | None, output: Output, **settings: Any) -> None:
    """Show how alike adapters are, for each module and overall; more than two are shown as a matrix.

    The cosine says whether both change weights in the same direction. The overlaps say how many of the inputs that they
    react to, and of the outputs that they change, are common, next to what random adapters of that size would have.
    Gain and interference say what would become of each if both were added. -v prints all of this for each module, with
    the principal angles; for more than two adapters, it prints all numbers of each pair. Checkpoints of one training
    run (checkpoint-500, ...) are also shown by step, with their norms and their cosines to the last one.

    \b
    Examples:
      loratools compare my-lora another-lora
      loratools compare run/checkpoint-*
      loratools compare run/checkpoint-* --plot run.svg
      loratools compare trained shipped --fail-below 0.999
    """
    from loratools.ops.compare.report import ComparisonMatrix
    from loratools.ops.compare.verb import compare

    if len(adapters) < 2:
        raise UsageError("compare needs two adapters or more", hint=f"name the one to compare '{adapters[0]}' with")
    with output.progress(None, "comparing") as progress:
        report: CompareReport | ComparisonMatrix = compare(*adapters, progress=progress, **settings)
    output.html(report)
    output.plot(report)
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        output.document(report.to_dict())
    else:
        from loratools.report.comparison import comparison_tables, matrix_tables

        if isinstance(report, ComparisonMatrix):
            output.table(*matrix_tables(report, every=output.verbose))
        else:
            output.table(*comparison_tables(report, every=output.verbose))
    if fail_below is not None and not report.is_at_least(fail_below):
        output.warn(f"a cosine is below {fail_below:g}")
        raise click.exceptions.Exit(1)
