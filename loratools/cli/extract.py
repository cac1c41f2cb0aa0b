"""extract: take an adapter out of a fine-tuned model."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options as options
from loratools.cli._output import Output


@click.command("extract")
@click.argument("base", type=options.SOURCE)
@click.argument("tuned", type=options.SOURCE)
@options.out
@click.option("--rank", type=click.IntRange(min=1), required=True, metavar="N", help="Rank of each module.")
@click.option("--exact", is_flag=True, help="By exact methods only: slower, for small models and for checking.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Share of the captured energy that may be missed; smaller reads each delta more often.  [default: 5e-5]",
)
@options.dtype
@options.seed
@options.threads
@options.include
@options.exclude
@options.plan
@options.overwrite
@options.common
def command(
    base: str,
    tuned: str,
    *,
    out: Path,
    rank: int,
    exact: bool,
    tolerance: float | None,
    dtype: str | None,
    seed: int,
    threads: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    plan: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Write the adapter that turns the model BASE into nearly the model TUNED, which was fine-tuned from it.

    Each linear weight that changed becomes a product of rank N. The energy captured and the error are measured on the
    stored values. What changed and is no linear weight is listed, and not extracted.

    \b
    Examples:
      loratools extract llama-3-8b my-finetune -o my-lora --rank 32
      loratools extract llama-3-8b my-finetune -o my-lora --rank 16 --exclude 'lm_head' --json
    """
    from loratools.checkpoints import open_checkpoint
    from loratools.ops.extract import extract

    before, after = open_checkpoint(Path(base)), open_checkpoint(Path(tuned))
    total = sum(t.nbytes for side in (before, after) for t in side.stored.values())
    with output.progress(None if plan else total, "extracting") as progress:
        report = extract(
            before,
            after,
            out,
            rank=rank,
            exact=exact,
            tolerance=tolerance,
            dtype=dtype or "F32",
            seed=seed,
            threads=threads,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            progress=progress,
            plan=plan,
        )
    if not output.quiet:
        from loratools.report.lowrank import skipped_lines

        for warning in report.warnings:
            output.warn(warning)
        for line in [] if plan else skipped_lines(report.skipped, every=output.verbose):
            output.warn(line)
    if output.json:
        output.document(report.as_json())
        return
    from loratools.report.lowrank import extract_summary, plan_tables

    if plan:
        output.table(*plan_tables(report, out))
    else:
        output.summary(*extract_summary(report))
