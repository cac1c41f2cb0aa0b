"""What extracting will do, and what it did, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.ops.extract import ExtractedModule, ExtractReport, Skipped
from loratools.report.pairs import pairs
from loratools.report.text import interval, number, plural, safe, size

# More of a kind than this are told as one line.
_SHOWN = 3


def extract_summary(report: ExtractReport) -> list[RenderableType]:
    """What is told on stderr after an extraction."""
    rows = [("extracted", f"{plural(len(report.modules), 'module')}, {ranks(m.rank for m in report.modules)}")]
    if report.unchanged:
        rows[0] = (rows[0][0], f"{rows[0][1]}; {plural(report.unchanged, 'tensor')} unchanged")
    rows.append(("captured", f"{_share(report.energy)} of their energy, relative error {number(report.error)}"))
    rows.append(("by module", _spread(report.modules)))
    gap = max((m.gap_estimate or 0.0 for m in report.modules), default=0.0)
    rows.append(("optimum", f"at most about {gap:.1g} of a module's energy above this" if gap else "reached"))
    if report.skipped:
        rows.append(("of all", f"{_share(report.change_captured)} of everything that changed"))
    return [pairs([*rows, ("written", f"{report.output}  {size(report.bytes)}")])]


def plan_tables(report: ExtractReport, out: object) -> list[RenderableType]:
    """What `--plan` prints: every module with its rank, then the whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("module", overflow="fold")
    table.add_column("rank", justify="right")
    for module in report.modules:
        table.add_row(Text(safe(module.name)), str(module.rank))
    return [table, pairs([("modules", str(len(report.modules))), ("output", f"{out}  {size(report.bytes)}")])]


def skipped_lines(skipped: Sequence[Skipped], *, every: bool) -> list[str]:
    """What changed and is not in the adapter, one line each; many of a kind as one line, unless `every`."""
    lines = []
    for why in sorted({s.why for s in skipped}):
        same = [s for s in skipped if s.why == why]
        if every or len(same) <= _SHOWN:
            lines += [f"not extracted: {s.name} ({why}{_norm(s)}{_part([s])})" for s in same]
        else:
            lines.append(f"not extracted: {same[0].name} and {len(same) - 1} more ({why}{_part(same)})")
    return lines


def _norm(skipped: Skipped) -> str:
    return f", norm {skipped.norm:.4g}" if skipped.norm is not None else ""


def _part(skipped: Sequence[Skipped]) -> str:
    shares = [s.share for s in skipped if s.share is not None]
    return f", {sum(shares):.2%} of all that changed" if shares else ""


def ranks(numbers: Iterable[int]) -> str:
    """`rank 8`, `ranks 2–16`."""
    found = sorted(set(numbers))
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {found[0]}–{found[-1]}" if found else "no rank"


def _spread(modules: Sequence[ExtractedModule]) -> str:
    return f"energy {interval(m.energy for m in modules)}, error {interval(m.error for m in modules)}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.4%}"
