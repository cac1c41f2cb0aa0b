"""resize: give an adapter a smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import RANK, option, verb
from loratools.cli.common.killed_runs import warn_of_killed_runs
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import document_of, replaced_rows


@verb("resize")
@click.argument("adapter", type=options.SOURCE)
@options.out
@options.rank
@options.energy
@options.error
@option(
    RANK,
    "--rule",
    type=options.RULE,
    metavar="NAME=F",
    help="A rule of kohya's scripts, and its number: sv_ratio, sv_cumulative or sv_fro.",
)
@options.max_size
@options.max_params
@options.max_rank
@options.dtype
@options.include
@options.exclude
@options.from_format
@options.output_format
@options.base
@options.rank_from
@options.expert_packing
@options.set_metadata
@options.strip_metadata
@options.threads
@options.plan
@options.card
@options.overwrite
@options.resume
@options.common
@options.sources
def command(
    adapter: str, *, out: Path, plan: bool, overwrite: bool, resume: bool, output: Output, **settings: Any
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
    from loratools.ops.resize.verb import resize

    said_before = warn_of_killed_runs(output, out, plan=plan, resume=resume)
    with output.progress(None, "resizing") as progress:
        report = resize(adapter, out, plan=plan, overwrite=overwrite, resume=resume, progress=progress, **settings)
    for warning in report.warnings:
        if warning not in said_before:
            output.warn(warning)
    if output.json:
        output.document(document_of(report, out, overwrite=overwrite, plan=plan))
        return
    from loratools.report.resizing import resize_plan, resize_summary

    if plan:
        output.table(*resize_plan(report, out), *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*resize_summary(report))
