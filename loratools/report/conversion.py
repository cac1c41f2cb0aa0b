"""What converting will do, and what it did, for people."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType

from loratools.ops.convert.report import ConvertReport
from loratools.report.pairs import pairs
from loratools.report.skipped import lines_of_skipped
from loratools.report.text import number, plural, size

# More names than this are shown as a count.
_SHOWN = 8


def conversion_summary(report: ConvertReport, out: Path) -> list[RenderableType]:
    """A few lines: formats, tensors, the error, what became of the metadata."""
    written = "written" if report.output is not None else "output"
    return [pairs([*conversion_facts(report), (written, f"{out}  {size(report.bytes or 0)}")])]


def conversion_facts(report: ConvertReport) -> list[tuple[str, str]]:
    """Return what a conversion did, in pairs of a word and a text."""
    rows = [
        (
            "converted" if report.output is not None else "to convert",
            f"{report.source_format} to {report.target_format}",
        ),
        ("tensors", f"{report.tensors_in:,} in, {report.tensors_out:,} out"),
    ]
    if report.max_relative_error is not None:
        checked = f"{plural(len(report.modules), 'part')} read back and compared"
        worst = report.max_relative_error
        rows.append(("error", f"{'none' if not worst else f'at most {number(worst)} relative'}; {checked}"))
    for word, names in (
        ("kept", report.kept),
        ("rewritten", report.recomputed),
        ("dropped", [d.name for d in report.dropped if d.what == "metadata"]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            rows.append((f"{word}", f"{', '.join(names[:_SHOWN])}{more} (metadata)"))
    return rows


def dropped_lines(report: ConvertReport, *, every: bool) -> list[str]:
    """What of the adapter itself is left out, one line each; many with one reason as one line, unless `every`."""
    parts = [d for d in report.dropped if d.what != "metadata"]
    return lines_of_skipped(parts, "left out", every=every, most=_SHOWN)
