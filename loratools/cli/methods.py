"""methods: how several adapters can be combined."""

from __future__ import annotations

import click

from loratools.cli.common.grouped_help import verb
from loratools.cli.common.options import METHOD, common
from loratools.cli.common.output import Output


@verb("methods", short_help="List the ways to combine adapters, or explain one.")
@click.argument("name", required=False, type=METHOD)
@common
def command(name: str | None, *, output: Output) -> None:
    """List the ways to combine adapters that this installation knows, with their options; or explain method NAME.

    The explanation of a method has its formula, its paper, what holds of it whatever its options, and its options. A
    method that commutes with rotations is exact in small coordinates. Others work entry by entry, in the coordinates
    that --set space=... of the verb combine names.

    \b
    Examples:
      loratools methods
      loratools methods ties
      loratools methods --json
    """
    from loratools import methods, registry

    names = registry.names("methods") if name is None else (name,)
    entries = []
    for method in names:
        # Loaded first: an unknown name is refused with what there is.
        laws = registry.load("methods", method).LAWS
        entries.append(
            {
                "name": method,
                "summary": registry.summary("methods", method),
                "description": registry.description("methods", method),
                "options": [
                    {"name": o.name, "default": o.default, "range": o.range, "about": o.about}
                    for o in methods.options_of(method)
                ],
                "laws": laws._asdict(),
            }
        )
    if output.json:
        output.document({"methods": entries})
    elif name is None:
        from loratools.report.entries import methods_table

        output.table(methods_table(entries))
    else:
        from loratools.report.method import method_page

        output.text(method_page(entries[0]))
