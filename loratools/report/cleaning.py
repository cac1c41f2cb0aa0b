"""What `clean` found, as a table of what killed runs left, and lines of what stays."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from loratools.ops.clean import CleanReport, RemovedRun
from loratools.report.pairs import pairs
from loratools.report.rows import Column, Rows
from loratools.report.text import safe, size


def cleaning_tables(report: CleanReport) -> list[RenderableType]:
    """A row for each killed run, what all of them took, and what stays with the reason."""
    if not report.removed and not report.kept:
        return [Text(safe(f"no killed run has left anything in '{report.folder}'"))]
    parts: list[RenderableType] = []
    if report.removed:
        runs = report.removed
        parts.append(
            Rows(
                [
                    Column("left by a killed run", [safe(str(run.path)) for run in runs], numeric=False),
                    Column("size", [size(run.bytes) for run in runs]),
                    Column("for", [safe(run.output.name) for run in runs], numeric=False, spare=1),
                    Column("begun", [run.started or "–" for run in runs], numeric=False, spare=2),
                    Column("process", [safe(_process(run)) for run in runs], numeric=False, spare=3),
                    Column("units done", [str(run.units) for run in runs], spare=4),
                ]
            )
        )
    rows = [(f"{'would be ' if report.planned else ''}removed", size(report.bytes))] if report.removed else []
    rows += [
        (f"{'would be ' if report.planned else ''}restored", f"'{run.output}', the old output of a killed run")
        for run in report.removed
        if run.action == "restored"
    ]
    rows += [("kept", f"'{skipped.name}': {skipped.why}") for skipped in report.kept]
    return [*parts, pairs(rows)] if rows else parts


def _process(run: RemovedRun) -> str:
    return f"{run.process} on {run.host}" if run.process is not None else "–"
