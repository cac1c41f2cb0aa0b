"""combine: make one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools import registry
from loratools.cli import _options as options
from loratools.cli._output import Output

if TYPE_CHECKING:
    from loratools.ops._arguments import RankFrom


@click.command("combine")
@click.argument("adapters", nargs=-1, required=True, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@options.out
@click.option(
    "--method",
    default="linear",
    show_default=True,
    metavar="NAME",
    help=f"How: {', '.join(registry.names('methods'))}. 'loratools methods' explains.",
)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Truncate each module to this rank.")
@click.option("--energy", type=options.SHARE, metavar="F", help="Truncate, keeping this share of each module's energy.")
@options.dtype
@options.include
@options.exclude
@options.from_format
@options.rank_from
@options.threads
@options.plan
@options.overwrite
@options.common
def command(
    adapters: tuple[options.Weighted, ...],
    *,
    out: Path,
    method: str,
    rank: int | None,
    energy: float | None,
    dtype: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    from_format: str | None,
    rank_from: RankFrom,
    threads: int | None,
    plan: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Write one adapter that does what the ADAPTERs do together, each times its weight W.

    Without --rank or --energy nothing is lost: ranks add up. With one of them, each module becomes the nearest of
    that size. For each adapter, the summary tells its gain (how much of it is in the result: its weight, where nothing
    overlaps) and its interference (how differently the result answers to the inputs that it reacts to).

    \b
    Examples:
      loratools combine style=0.7 facts=0.3 -o both
      loratools combine style facts -o both --rank 16
      loratools combine instruct chat=-0.5 -o less-chatty
    """
    from loratools.ops.combine import combine

    with output.progress(None, "combining") as progress:
        report = combine(
            [(a.source, a.weight) for a in adapters],
            out,
            method=method,
            rank=rank,
            energy=energy,
            dtype=dtype,
            include=include,
            exclude=exclude,
            from_format=from_format,
            rank_from=rank_from,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
            plan=plan,
        )
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        output.document(report.as_json())
        return
    from loratools.report.lowrank import combine_summary, plan_tables

    if plan:
        output.table(*plan_tables(report, out))
    else:
        output.summary(*combine_summary(report))
