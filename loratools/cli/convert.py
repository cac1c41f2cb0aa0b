"""convert: write an adapter in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import INPUT, OUTPUT, SELECTION, option, verb
from loratools.cli.common.killed_runs import warn_of_killed_runs
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import document_of, replaced_rows


@verb("convert")
@click.argument("adapter", type=options.SOURCE)
@options.out
@option(
    OUTPUT,
    "--to",
    "format",
    required=True,
    type=options.WRITTEN_FORMAT,
    metavar="FORMAT",
    help="The format to write; 'loratools formats' lists them.",
)
@options.base
@option(SELECTION, "--allow-partial", is_flag=True, help="Leave out what the format cannot hold, and list it.")
@option(INPUT, "--alpha", type=float, metavar="F", help="Alpha of an adapter whose files do not state it.")
@option(
    OUTPUT,
    "--serve",
    metavar="SERVER",
    help="With --to peft: write what this server loads: vllm, sglang, tgi, lorax or tensorrt-llm.",
)
@options.dtype
@options.include
@options.exclude
@options.from_format
@options.rank_from
@options.expert_packing
@options.expert_orientation
@options.set_metadata
@options.strip_metadata
@options.plan
@options.card
@options.overwrite
@options.resume
@options.common
@options.sources
def command(
    adapter: str, *, out: Path, plan: bool, overwrite: bool, resume: bool, output: Output, **settings: Any
) -> None:
    """Write ADAPTER in another format.

    The result is read back and compared with the source, module by module, before it appears, and the largest relative
    error is printed. Modules that the format cannot hold are an error that names them.

    \b
    Examples:
      loratools convert my-lora -o my-lora-mlx --to mlx
      loratools convert my-lora -o my-lora.gguf --to gguf --base path/to/base
      loratools convert my-lora -o served --to peft --serve vllm
      loratools convert ink.safetensors -o ink-2.safetensors --to kohya --set-metadata modelspec.title=Ink
    """
    from loratools.ops.convert.verb import convert

    said_before = warn_of_killed_runs(output, out, plan=plan, resume=resume)
    report = convert(adapter, out, plan=plan, overwrite=overwrite, resume=resume, **settings)
    for warning in report.warnings:
        if warning not in said_before:
            output.warn(warning)
    if output.json:
        output.document(document_of(report, out, overwrite=overwrite, plan=plan))
        return
    from loratools.report.conversion import conversion_summary, dropped_lines

    for line in dropped_lines(report, every=output.verbose):
        output.warn(line)
    if plan:
        output.table(*conversion_summary(report, out), *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*conversion_summary(report, out))
