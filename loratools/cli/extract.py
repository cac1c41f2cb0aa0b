"""extract: take an adapter out of a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli.common import options
from loratools.cli.common.held import holds_inputs
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import replaced_rows, with_replaced

if TYPE_CHECKING:
    from loratools.ops.extract.outcomes import Embeddings


@click.command("extract")
@click.argument("base", type=options.SOURCE)
@click.argument("tuned", type=options.SOURCE)
@options.out
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of each module.")
@click.option("--energy", type=options.SHARE, metavar="F", help="Smallest rank that keeps this share of the energy.")
@click.option("--error", type=options.SHARE, metavar="F", help="Smallest rank with at most this relative error.")
@click.option("--noise-edge", is_flag=True, help="What rises above the rounding noise of TUNED, and no more.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="No module gets a higher rank.")
@click.option("--max-size", type=options.SIZE, metavar="SIZE", help="Share ranks out for a file of at most this size.")
@click.option("--max-params", type=click.IntRange(min=1), metavar="N", help="The same, for so many parameters.")
@click.option(
    "--embeddings",
    type=click.Choice(["auto", "lora", "rows", "full", "skip"]),
    default="auto",
    show_default=True,
    help="Embeddings as factors, as the rows that changed, whole, not at all, or what is smallest.",
)
@click.option(
    "--whole", multiple=True, metavar="GLOB", help="Modules to store as TUNED has them: exact, and large; repeatable."
)
@click.option("--exact", is_flag=True, help="By exact methods only: slower, for small models and for checking.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Share of the captured energy that may be missed; smaller reads each delta more often.  [default: 5e-5]",
)
@options.to_format
@options.dtype
@options.seed
@options.threads
@options.device
@options.include
@options.exclude
@options.plan
@options.overwrite
@options.common
@holds_inputs
def command(
    base: str,
    tuned: str,
    *,
    out: Path,
    rank: int | None,
    energy: float | None,
    error: float | None,
    noise_edge: bool,
    max_rank: int | None,
    max_size: int | None,
    max_params: int | None,
    embeddings: Embeddings,
    whole: tuple[str, ...],
    exact: bool,
    tolerance: float | None,
    format: str,
    dtype: str | None,
    seed: int,
    threads: int | None,
    device: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    plan: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Write the adapter that turns the model BASE into nearly the model TUNED, which was fine-tuned from it.

    Each weight of a layer that changed becomes a product of small rank: one rule chooses it (--rank, --energy, --error
    or --noise-edge), and limits hold for each (--max-rank) or for all together (--max-size, --max-params). Norms,
    biases and new heads are taken whole. The energy captured and the error are measured on the stored values. What
    changed and is in neither is listed.

    \b
    Examples:
      loratools extract llama-3-8b my-finetune -o my-lora --rank 32
      loratools extract llama-3-8b my-finetune -o my-lora --energy 0.9 --max-rank 128
      loratools extract llama-3-8b my-finetune -o my-lora --max-size 100MB --json
    """
    from loratools.checkpoints import open_checkpoint
    from loratools.ops.extract.verb import extract

    before, after = open_checkpoint(Path(base)), open_checkpoint(Path(tuned))
    total = sum(t.nbytes for side in (before, after) for t in side.stored.values())
    with output.progress(None if plan else total, "extracting") as progress:
        report = extract(
            before,
            after,
            out,
            rank=rank,
            energy=energy,
            error=error,
            noise_edge=noise_edge,
            max_rank=max_rank,
            max_size=max_size,
            max_params=max_params,
            embeddings=embeddings,
            whole=whole,
            exact=exact,
            tolerance=tolerance,
            format=format,
            dtype=dtype or "F32",
            seed=seed,
            threads=threads,
            device=device,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            progress=progress,
            plan=plan,
        )
    if not output.quiet:
        from loratools.report.extraction import skipped_lines

        for warning in report.warnings:
            output.warn(warning)
        for line in [] if plan else skipped_lines(report.skipped, every=output.verbose):
            output.warn(line)
    if output.json:
        document = report.as_json()
        output.document(with_replaced(document, out, overwrite=overwrite) if plan else document)
        return
    from loratools.report.extraction import extract_plan, extract_summary

    if plan:
        output.table(*extract_plan(report, out), *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*extract_summary(report))
