"""Several methods side by side, for people."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from loratools.ops.combine.side_by_side import MethodsReport
from loratools.report.fields import NOTHING, short
from loratools.report.rows import Column, Rows
from loratools.report.text import safe, size


def methods_compared(report: MethodsReport) -> list[RenderableType]:
    """One table: a row per method with the gain and the interference of each adapter, and the refused ones below."""
    ran = [outcome for outcome in report.methods if outcome.refused is None]
    lines: list[RenderableType] = []
    if ran:
        shares = ran[0].adapters
        columns = [Column("method", [outcome.method for outcome in ran], numeric=False)]
        for i in range(len(shares)):
            gains = [_short(outcome.adapters[i].gain) for outcome in ran]
            interferences = [_short(outcome.adapters[i].interference) for outcome in ran]
            columns += [Column(f"gain {i + 1}", gains), Column(f"interference {i + 1}", interferences)]
        columns += [
            Column("error", [_short(outcome.error) for outcome in ran], spare=1),
            Column("rank", [str(outcome.rank) if outcome.rank is not None else NOTHING for outcome in ran], spare=2),
            Column("size", [size(outcome.bytes or 0) for outcome in ran], spare=4),
            Column("seconds", [f"{outcome.seconds or 0:.2g}" for outcome in ran], spare=3),
        ]
        lines += [Text(f"{i + 1}  {safe(share.path)} × {share.weight:g}") for i, share in enumerate(shares)]
        lines += [Text(""), Rows(columns)]
    refused = [outcome for outcome in report.methods if outcome.refused is not None]
    if refused:
        lines.append(Text(""))
        lines += [Text(f"{outcome.method}: {safe(outcome.refused or '')}") for outcome in refused]
    return lines


def _short(value: float | None) -> str:
    return NOTHING if value is None else short(value)
