"""Rules are asked about one subject, and what they observe becomes findings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from loratools import checks
from loratools.checks.common.subject import Subject
from loratools.ops.check.report import CheckFinding

_BY_SEVERITY = {"error": 0, "warning": 1, "note": 2}
# What says why something cannot be read where no other rule does, and so has to be asked last.
_LAST = "container-not-read"


def findings(subject: Subject, rules: Collection[str]) -> tuple[CheckFinding, ...]:
    """What the rules observe, errors first.

    Args:
        subject: What they look at.
        rules: The ids of those whose findings are wanted. The others are asked too where the source cannot be read, so
            that it is known whether they explain why.
    """
    asked = [id for id in checks.ids() if id != _LAST and (id in rules or subject.error is not None)]
    observed = [finding for id in asked for finding in _findings_of(id, subject)]
    if _LAST in rules:
        explained = any(finding.severity == "error" for finding in observed)
        observed += _findings_of(_LAST, replace(subject, explained=explained))
    wanted = [finding for finding in observed if finding.id in rules]
    return in_order(wanted)


def in_order(unordered: Iterable[CheckFinding]) -> tuple[CheckFinding, ...]:
    """Errors first, then warnings, then notes; of one severity by family, as they were asked."""
    return tuple(sorted(unordered, key=lambda finding: _BY_SEVERITY[finding.severity]))


def _findings_of(id: str, subject: Subject) -> Iterator[CheckFinding]:
    rule = checks.rule(id)
    for message, evidence, fix in rule.observe(subject):
        yield CheckFinding(id, rule.SEVERITY, message, evidence, fix or rule.FIX)
