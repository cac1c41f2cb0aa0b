"""methods: how several adapters can be combined."""

from __future__ import annotations

import click

from loratools.cli.common.options import common
from loratools.cli.common.output import Output


@click.command("methods", short_help="List the ways to combine adapters.")
@common
def command(*, output: Output) -> None:
    """List the ways to combine adapters that this installation knows, with what can be set of them.

    A method is exact in small coordinates where it commutes with turning both sides of a weight. Others work entry by
    entry, in the coordinates that --set space=... names.

    \b
    Example:
      loratools methods --json
    """
    from loratools import methods, registry

    entries = [
        {
            "name": name,
            "summary": registry.summary("methods", name),
            "options": [
                {"name": o.name, "default": o.default, "range": o.range, "about": o.about}
                for o in methods.options_of(name)
            ],
            "laws": registry.load("methods", name).LAWS._asdict(),
        }
        for name in registry.names("methods")
    ]
    if output.json:
        output.document({"methods": entries})
        return
    from loratools.report.entries import methods_table

    output.table(methods_table(entries))
