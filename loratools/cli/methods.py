"""methods: how several adapters can be combined."""

from __future__ import annotations

import click

from loratools.cli._options import common
from loratools.cli._output import Output


@click.command("methods", short_help="List the ways to combine adapters.")
@common
def command(*, output: Output) -> None:
    """List the ways to combine adapters that this installation knows.

    \b
    Example:
      loratools methods --json
    """
    from loratools import registry

    entries = [{"name": n, "summary": registry.summary("methods", n)} for n in registry.names("methods")]
    if output.json:
        output.document({"methods": entries})
        return
    from loratools.report.entries import entries_table

    output.table(entries_table("method", entries))
