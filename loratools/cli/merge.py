"""merge: put adapters into a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, OUTPUT, ChoiceOrAlone, option, verb
from loratools.cli.common.held import holds_inputs
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import replaced_rows, with_replaced


@verb("merge")
@click.argument("base", type=options.SOURCE)
@click.argument("adapters", nargs=-1, required=True, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@options.out
@options.plan
@options.dtype
@option(
    OUTPUT,
    "--max-shard-size",
    type=options.SIZE,
    metavar="SIZE",
    help="Largest size of a file; more weights begin a new one.",
)
@option(OUTPUT, "--dequantize", is_flag=True, help="Write quantised weights as floats, in the dtype of the config.")
@click.option(
    "--requantize",
    cls=ChoiceOrAlone,
    group=OUTPUT,
    choices=["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"],
    metavar="[TYPE]",
    help="Store changed quantised weights in the base's own scheme. For a GGUF base, a TYPE may be named: q8_0, "
    "q5_1, q5_0, q4_1 or q4_0.",
)
@option(
    INPUT,
    "--trained-on",
    metavar="SCHEME",
    help="How training quantised the base: nf4, fp4, int8, or a JSON file with its quantization_config.",
)
@option(
    OUTPUT,
    "--rounding",
    type=click.Choice(["nearest", "stochastic", "adapter", "calibrated"]),
    default="nearest",
    show_default=True,
    help="How sums are rounded to the stored dtype.",
)
@options.seed
@option(
    OUTPUT,
    "--lambda",
    "penalty",
    type=float,
    metavar="F",
    help="With --rounding adapter or calibrated: how much rounding errors on all other inputs count.  "
    "[default: 0.25 and 0.01; for quantised weights 0.1 and 0.01]",
)
@option(
    OUTPUT,
    "--moments",
    type=options.PATH,
    metavar="FILE",
    help="With --rounding calibrated: a safetensors file with the sum of x x' over the inputs x of each module.",
)
@options.allow_partial
@option(EXECUTION, "--no-verify", is_flag=True, help="Do not read the result back to check it.")
@options.include
@options.exclude
@options.from_format
@options.rank_from
@options.initial
@options.expert_packing
@options.expert_orientation
@options.threads
@options.card
@options.overwrite
@options.resume
@option(OUTPUT, "--manifest", is_flag=True, help="Record the SHA-256 of every file, for 'verify --files'.")
@options.common
@options.sources
@options.html
@holds_inputs
def command(
    base: str,
    adapters: tuple[options.Weighted, ...],
    *,
    out: Path,
    plan: bool,
    no_verify: bool,
    threads: int | None,
    overwrite: bool,
    resume: bool,
    manifest: bool,
    card: bool,
    output: Output,
    **settings: Any,
) -> None:
    """Add ADAPTERs to the weights of BASE, each times its weight W, and write the merged model.

    The sum is formed in float32 and rounded once. Weights that no adapter touches keep their bytes. The change of each
    adapter is computed from BASE itself, so the order of the adapters does not matter. (PEFT merges adapters that
    rescale weights, such as DoRA, OFT and IA3, one after the other, so that there the order matters.)

    \b
    Examples:
      loratools merge llama-3-8b my-lora -o merged
      loratools merge llama-3-8b style=0.7 facts=0.3 -o merged --plan
    """
    from loratools.ops.common.abandoned import abandoned_warnings
    from loratools.ops.merge import verb as op
    from loratools.ops.merge.options import MergeOptions

    merge_plan = op.plan_from_headers(base, adapters, out, MergeOptions(**settings), overwrite=overwrite, card=card)
    if plan:
        output.html(merge_plan)
        if output.json:
            output.document(with_replaced(merge_plan.to_dict(), out, overwrite=overwrite))
        else:
            from loratools.report.merge import plan_table

            output.table(*plan_table(merge_plan, out), *replaced_rows(out, overwrite=overwrite))
        return
    warnings = [*merge_plan.warnings, *([] if resume else abandoned_warnings(out))]
    for warning in warnings:
        output.warn(warning)
    if output.verbose:
        from loratools.report.merge import explained

        for line in explained(merge_plan):
            output.explain(line)
    with output.progress(merge_plan.bytes_written, "merging") as progress:
        report = op.run(
            merge_plan,
            out,
            overwrite=overwrite,
            verify=not no_verify,
            threads=threads,
            execution="forked",
            progress=progress,
            resume=resume,
            manifest=manifest,
        )
    output.html(report)
    for warning in report.warnings:
        if warning not in warnings:
            output.warn(warning)
    if output.json:
        output.document(report.to_dict())
        return
    if output.quiet:
        return
    from loratools.report.merge import gguf_step, summary

    output.summary(*summary(report, next_step=gguf_step(merge_plan, out)))
