"""formats: what can be read and written."""

from __future__ import annotations

from loratools.cli.common.grouped_help import verb
from loratools.cli.common.options import common
from loratools.cli.common.output import Output


@verb("formats", short_help="List the formats and layouts.")
@common
def command(*, output: Output) -> None:
    """List the adapter formats and checkpoint layouts that this installation knows.

    \b
    Example:
      loratools formats --json
    """
    from loratools.ops.registries import list_formats, list_layouts

    formats = [entry.to_dict() for entry in list_formats()]
    layouts = [entry.to_dict() for entry in list_layouts()]
    if output.json:
        output.document({"formats": formats, "layouts": layouts})
        return
    from loratools.report.entries import entries_table

    output.table(entries_table("adapter format", formats), "", entries_table("checkpoint layout", layouts))
