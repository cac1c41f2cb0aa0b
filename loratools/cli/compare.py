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
    """Tell how alike two adapters are, per module and overall, and what targets only one of them has.

    The cosine says whether they change weights in the same direction; the overlaps, how much of the inputs they react
    to and of the outputs they change is common, beside what subspaces of that size share at random; gain and
    interference, what each would meet if both were added. -v tells it by module, with the principal angles.

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
