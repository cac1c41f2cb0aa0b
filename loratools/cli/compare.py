"""compare: how alike two adapters are."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import verb
from loratools.cli.common.output import Output


@verb("compare")
@click.argument("first", type=options.SOURCE, metavar="ADAPTER")
@click.argument("second", type=options.SOURCE, metavar="ADAPTER")
@options.include
@options.exclude
@options.from_format
@options.base
@options.rank_from
@options.expert_packing
@options.threads
@options.common
def command(first: str, second: str, *, output: Output, **settings: Any) -> None:
    """Show how alike two adapters are, for each module and overall, and which modules only one of them has.

    The cosine says whether both change weights in the same direction. The overlaps say how much of the inputs that they
    react to, and of the outputs that they change, is common, next to what random adapters of that size would have. Gain
    and interference say what would become of each if both were added. -v prints all of it for each module, with the
    principal angles.

    \b
    Example:
      loratools compare my-lora another-lora
    """
    from loratools.ops.compare import compare

    with output.progress(None, "comparing") as progress:
        report = compare(first, second, progress=progress, **settings)
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        output.document(report.to_dict())
        return
    from loratools.report.comparison import comparison_tables

    output.table(*comparison_tables(report, every=output.verbose))
