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
    from loratools.ops.registries import list_methods, method_named

    # One that is not there is refused with those that are.
    methods = list_methods() if name is None else (method_named(name),)
    entries = [method.to_dict() for method in methods]
    if output.json:
        output.document({"methods": entries})
    elif name is None:
        from loratools.report.entries import methods_table

        output.table(methods_table(entries))
    else:
        from loratools.report.method import method_page

        output.text(method_page(entries[0]))
