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
    from loratools import registry

    formats: list[dict[str, object]] = []
    for name in registry.names("formats"):
        entry = registry.load("formats", name)
        able = {"read": hasattr(entry, "read"), "write": hasattr(entry, "write")}
        formats.append({"name": name, **able, "summary": registry.summary("formats", name)})
    layouts: list[dict[str, object]] = [
        {"name": name, "summary": registry.summary("checkpoints", name)} for name in registry.names("checkpoints")
    ]
    if output.json:
        output.document({"formats": formats, "layouts": layouts})
        return
    from loratools.report.entries import entries_table

    output.table(entries_table("adapter format", formats), "", entries_table("checkpoint layout", layouts))
