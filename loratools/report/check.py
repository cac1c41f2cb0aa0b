"""What a check tells, for people: the findings of each source, then how many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from loratools.ops.check.report import CheckedSource, CheckFinding, CheckReport
from loratools.report.text import plural, safe

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
_SHOWN_EVIDENCE = 5


def check_tables(report: CheckReport, *, every: bool = False) -> list[RenderableType]:
    """A block for each source with findings.

    Args:
        report: The check.
        every: Show every piece of evidence, and sources without findings.
    """
    of_sources = [line for source in report.sources if source.findings or every for line in _lines(source, every=every)]
    return [*of_sources, *_not_checked_lines(report, every=every)]


def _not_checked_lines(report: CheckReport, *, every: bool) -> Iterator[RenderableType]:
    """What rules could not look at: no finding there is no proof. Rules that lack the same are on one line."""
    parts: dict[tuple[str, str], list[tuple[str, tuple[str, ...]]]] = {}
    for source in report.sources:
        for each in source.not_checked:
            parts.setdefault((each.id, each.why), []).append((source.path, each.names))
    rules: dict[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], list[str]] = {}
    for (id, why), places in parts.items():
        rules.setdefault((why, tuple(places)), []).append(id)
    for (why, places_of_all), ids in rules.items():
        modules = sum(len(names) for _, names in places_of_all)
        count = f"{plural(modules, 'module')} of " if modules else ""
        listed = f": {', '.join(safe(path) for path, _ in places_of_all)}" if every else ""
        sources = plural(len(places_of_all), "source")
        yield Text(f"not checked[{', '.join(ids)}] {count}{sources}, as {safe(why)}{listed}", overflow="fold")


def _lines(source: CheckedSource, *, every: bool) -> Iterator[RenderableType]:
    yield Text(safe(source.path), style="bold", overflow="fold")
    if not source.findings:
        yield Text("  no findings")
    for finding in source.findings:
        yield from _of_finding(finding, every=every)


def _of_finding(finding: CheckFinding, *, every: bool) -> Iterator[RenderableType]:
    head = Text("  ", overflow="fold")
    head.append(f"{finding.severity}[{finding.id}]", style=_COLOURS[finding.severity])
    head.append(f" {safe(finding.message)}")
    yield head
    shown = finding.evidence if every else finding.evidence[:_SHOWN_EVIDENCE]
    yield from (Text(f"      {safe(line)}", overflow="fold") for line in shown)
    if more := len(finding.evidence) - len(shown):
        yield Text(f"      … and {more:,} more; -v shows all")
    yield Text(f"    fix: {safe(finding.fix)}", overflow="fold")


def check_summary(report: CheckReport) -> Text:
    """How many sources were checked, and how many findings of each severity there are."""
    counts = Counter(finding.severity for finding in report.findings)
    parts = [plural(counts[severity], severity) for severity in ("error", "warning", "note") if counts[severity]]
    baselined = sum(source.baselined for source in report.sources)
    known = [f"{baselined:,} in the baseline"] if baselined else []
    return Text(f"{plural(len(report.sources), 'source')} checked: {', '.join([*(parts or ['no findings']), *known])}")
