"""resize: give an adapter a smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli.common import options
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import replaced_rows, with_replaced

if TYPE_CHECKING:
    from loratools.ops.common.arguments import RankFrom


@click.command("resize")
@click.argument("adapter", type=options.SOURCE)
@options.out
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="At most this rank.")
@click.option("--energy", type=options.SHARE, metavar="F", help="Smallest rank that keeps this share of the energy.")
@click.option("--error", type=options.SHARE, metavar="F", help="Smallest rank with at most this relative error.")
@click.option("--rule", type=options.RULE, metavar="NAME=F", help="A rule of kohya's: sv_ratio, sv_cumulative, sv_fro.")
@click.option("--max-size", type=options.SIZE, metavar="SIZE", help="The best file of weights of at most this size.")
@click.option("--max-params", type=click.IntRange(min=1), metavar="N", help="The best with at most so many parameters.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="No rank above this, whatever the rule.")
@options.dtype
@options.include
@options.exclude
@options.from_format
@options.output_format
@options.base
@options.rank_from
@options.threads
@options.plan
@options.overwrite
@options.common
def command(
    adapter: str,
    *,
    out: Path,
    rank: int | None,
    energy: float | None,
    error: float | None,
    rule: tuple[str, float] | None,
    max_size: int | None,
    max_params: int | None,
    max_rank: int | None,
    dtype: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    from_format: str | None,
    format: str | None,
    base: str | None,
    rank_from: RankFrom,
    threads: int | None,
    plan: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Write the adapter that is nearest to ADAPTER, module by module, at the smallest rank that the rule allows.

    One of --rank, --energy, --error and --rule is the rule for each module; --max-size and --max-params are for all of
    them together, shared out by singular values so that the least is lost. A module that is small enough keeps its
    bytes: no rank grows. --plan computes ranks and errors and writes nothing.

    \b
    Examples:
      loratools resize my-lora -o smaller --rank 8
      loratools resize my-lora -o smaller --energy 0.99
      loratools resize my-lora -o smaller --max-size 20MB
      loratools resize my-lora -o smaller --rule sv_fro=0.9 --max-rank 32
    """
    from loratools.ops.resize import resize

    with output.progress(None, "resizing") as progress:
        report = resize(
            adapter,
            out,
            rank=rank,
            energy=energy,
            error=error,
            rule=rule,
            max_size=max_size,
            max_params=max_params,
            max_rank=max_rank,
            dtype=dtype,
            include=include,
            exclude=exclude,
            from_format=from_format,
            format=format,
            base=base,
            rank_from=rank_from,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
            plan=plan,
        )
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        document = report.as_json()
        output.document(with_replaced(document, out, overwrite=overwrite) if plan else document)
        return
    from loratools.report.resizing import resize_plan, resize_summary

    if plan:
        output.table(*resize_plan(report, out), *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*resize_summary(report))
