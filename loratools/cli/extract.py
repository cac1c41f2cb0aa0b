"""extract: take an adapter out of a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, RANK, SELECTION, option, verb
from loratools.cli.common.held import holds_inputs
from loratools.cli.common.killed_runs import warn_of_killed_runs
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import document_of, replaced_rows


@verb("extract")
@click.argument("base", type=options.SOURCE)
@click.argument("tuned", type=options.SOURCE)
@options.out
@options.rank
@options.energy
@options.error
@option(
    RANK,
    "--noise-edge",
    is_flag=True,
    help="Keep the singular values above the noise of rounding (and of quantisation), and no others.",
)
@options.max_rank
@options.max_size
@options.max_params
@option(
    SELECTION,
    "--embeddings",
    type=click.Choice(["auto", "lora", "rows", "full", "skip"]),
    default="auto",
    show_default=True,
    help=(
        "How to store embeddings: as factors (lora), as the rows that changed (rows), in full, not at all (skip), "
        "or as what is smallest (auto)."
    ),
)
@option(
    SELECTION,
    "--whole",
    multiple=True,
    metavar="GLOB",
    help="Store modules whose names match exactly as TUNED has them, which is large; repeatable.",
)
@option(
    EXECUTION,
    "--exact",
    is_flag=True,
    help="Use exact methods only, which are slower: for small models and for checking.",
)
@option(
    EXECUTION,
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="F",
    help=(
        "Share of the energy that the approximate method may miss; a smaller one reads each delta more often. "
        "[default: 5e-5]"
    ),
)
@options.to_format
@options.float32_dtype
@options.seed
@options.threads
@options.device
@options.include
@options.exclude
@options.plan
@options.card
@options.overwrite
@options.resume
@options.common
@options.sources
@options.html
@holds_inputs
def command(
    base: str, tuned: str, *, out: Path, plan: bool, overwrite: bool, resume: bool, output: Output, **settings: Any
) -> None:
    """Write the adapter that turns the model BASE nearly into TUNED, a model that was fine-tuned from it.

    Each weight that changed becomes a product of small rank. One rule chooses the rank (--rank, --energy, --error or
    --noise-edge), within limits for each module (--max-rank) or for all together (--max-size, --max-params). Norms,
    biases and new heads are stored in full. Energy and error are measured on the stored values. Tensors that changed
    but cannot be stored in an adapter are listed.

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
    abandoned = warn_of_killed_runs(output, out, plan=plan, resume=resume)
    with output.progress(None if plan else total, "extracting") as progress:
        report = extract(
            before, after, out, plan=plan, overwrite=overwrite, resume=resume, progress=progress, **settings
        )
    output.html(report)
    if not output.quiet:
        from loratools.report.extraction import skipped_lines

        for warning in report.warnings:
            if warning not in abandoned:
                output.warn(warning)
        for line in [] if plan else skipped_lines(report.skipped, every=output.verbose):
            output.warn(line)
    if output.json:
        output.document(document_of(report, out, overwrite=overwrite, plan=plan))
        return
    from loratools.report.extraction import extract_plan, extract_summary

    if plan:
        output.table(*extract_plan(report, out), *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*extract_summary(report))
