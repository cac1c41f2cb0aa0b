"""What an extraction will do, and what it did, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from loratools.ops.extract.report import ExtractReport
from loratools.report.pairs import pairs
from loratools.report.pictures.of_reports import LEAST_ERROR, maps
from loratools.report.rows import Column, Rows
from loratools.report.skipped import lines_of_skipped
from loratools.report.text import interval, number, plural, safe, shape, size
from loratools.skipped import Skipped

# More of a kind than this are shown as one line.
_SHOWN = 3


def extract_summary(report: ExtractReport) -> list[RenderableType]:
    """Lines printed on stderr after an extraction."""
    facts = pairs([*extract_facts(report), ("written", f"{report.output}  {size(report.bytes or 0)}")])
    return [facts, maps(report.charts, "Error")] if (report.error or 0.0) > LEAST_ERROR else [facts]


def extract_facts(report: ExtractReport) -> list[tuple[str, str]]:
    """Return what an extraction did, in pairs of a word and a text."""
    rows = [("extracted", f"{plural(len(report.modules), 'module')}, {_ranks(report)}")]
    if report.unchanged:
        rows[0] = (rows[0][0], f"{rows[0][1]}; {plural(report.unchanged, 'tensor')} unchanged")
    if report.modules:
        rows.append(("captured", f"{_share(report.energy)} of their energy, relative error {number(report.error)}"))
        energies, errors = interval(m.energy for m in report.modules), interval(m.error for m in report.modules)
        rows.append(("by module", f"energy {energies}, error {errors}"))
        gap = max((m.gap_estimate or 0.0 for m in report.modules), default=0.0)
        rows.append(("optimum", f"at most about {gap:.1g} of a module's energy above this" if gap else "reached"))
    if report.identical:
        rows.append(("identical", f"{_share(report.identical)} of their weights are bit for bit the base's"))
    if report.quantization_error is not None:
        rows.append(("quantisation", f"its error alone has {_times(report.quantization_error)} the norm of the change"))
    if report.replacements:
        nbytes = sum(r.bytes for r in report.replacements)
        rows.append(
            ("whole", f"{plural(len(report.replacements), 'tensor')}, as the fine-tune has them, {size(nbytes)}")
        )
    if report.skipped or report.replacements:
        rows.append(("of all", f"{_share(report.change_captured)} of everything that changed"))
    return rows


def extract_plan(report: ExtractReport, out: object) -> list[RenderableType]:
    """What `--plan` prints: every module with its shape and rank, what is taken whole, then what it all needs."""
    ranks = ["by value" if m.rank is None else str(m.rank) for m in report.modules]
    parts = [(m.name, m.shape) for m in report.modules] + [(r.name, r.shape) for r in report.replacements]
    table = Rows(
        [
            Column("module", [safe(name) for name, _ in parts], numeric=False),
            Column("shape", [shape(sizes) for _, sizes in parts]),
            Column("rank", [*ranks, *["whole"] * len(report.replacements)]),
        ]
    )
    return [table, pairs(extract_plan_facts(report, out))]


def extract_plan_facts(report: ExtractReport, out: object) -> list[tuple[str, str]]:
    """Return what an extraction will do, in pairs of a word and a text."""
    nbytes = "size known when computed" if report.bytes is None else f"at most {size(report.bytes)}"
    rows = [("modules", str(len(report.modules))), ("output", f"{out}  {nbytes}")]
    if report.cost is not None:
        rows += [("memory", f"about {size(report.cost.memory)}"), ("time", _time(report.cost.seconds))]
    return rows


def skipped_lines(skipped: Sequence[Skipped], *, every: bool) -> list[str]:
    """What changed and is not in the adapter, one line each; many of a kind as one line, unless `every`."""
    return lines_of_skipped(skipped, "not extracted", every=every, most=_SHOWN, details=_sizes)


def _sizes(skipped: Sequence[Skipped]) -> str:
    """The norm of the one that was skipped, and the share of all of them."""
    norm = skipped[0].norm if len(skipped) == 1 else None
    shares = [s.share for s in skipped if s.share is not None]
    share = f", {sum(shares):.2%} of all that changed" if shares else ""
    return (f", norm {norm:.4g}" if norm is not None else "") + share


def _ranks(report: ExtractReport) -> str:
    ranks = sorted({m.rank for m in report.modules if m.rank is not None})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}" if ranks else "no rank"


def _times(share: float) -> str:
    return f"{share:.2%} of" if share < 1 else f"{share:.1f} times"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.4%}"


def _time(seconds: float) -> str:
    return "about a second, and reading" if seconds < 1.5 else f"about {seconds:.0f} s, and reading"
