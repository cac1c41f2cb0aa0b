"""spectrum: singular values, and what each rank would keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, PRINTING, RANK, option, verb
from loratools.cli.common.held import holds_inputs
from loratools.cli.common.output import Output


@verb("spectrum")
@click.argument("source", type=options.SOURCE)
@option(
    INPUT,
    "--base",
    type=options.SOURCE,
    metavar="BASE",
    help="The model that SOURCE was trained from, where SOURCE is a model.",
)
@option(
    RANK,
    "--max-rank",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Largest rank to report.",
)
@option(PRINTING, "--modules", is_flag=True, help="Print a row for every module.")
@option(
    EXECUTION,
    "--exact",
    is_flag=True,
    help="Compute all singular values of the change between two models by exact methods, which is slower.",
)
@options.float32_dtype
@options.seed
@options.threads
@options.device
@options.include
@options.exclude
@options.from_format
@options.rank_from
@options.expert_packing
@options.common
@options.sources
@options.plot
@options.html_alone
@holds_inputs
def command(source: str, *, base: str | None, modules: bool, output: Output, **settings: Any) -> None:
    """Show the singular values of an adapter, or of a fine-tuned model, and what each rank would keep of it.

    For every rank, the table has the share of the energy that it keeps, the relative error, the module that loses most,
    the size of the file, and the energy that a file of the same size keeps if each module gets a rank of its own. Below
    the table stands the rank beyond which there is little to gain. --plot draws the singular values, what each rank
    keeps, and where in the model the change is.

    \b
    Examples:
      loratools spectrum my-lora
      loratools spectrum my-finetune --base llama-3-8b --max-rank 256
      loratools spectrum my-lora --plot my-lora.pdf
    """
    from loratools.ops.spectrum.verb import spectrum

    total = None
    if base is not None:
        from loratools.checkpoints import open_checkpoint

        total = sum(t.nbytes for side in (base, source) for t in open_checkpoint(Path(side)).stored.values())
    with output.progress(total, "decomposing") as progress:
        report = spectrum(source, base, progress=progress, **settings)
    output.html(report)
    output.plot(report)
    for warning in report.warnings:
        output.warn(warning)
    for skipped in report.skipped:
        output.explain(f"not looked at: {skipped.name} ({skipped.why})")
    if output.json:
        output.document(report.to_dict())
        return
    from loratools.report.spectrum import spectrum_report

    output.table(*spectrum_report(report, modules=modules))
