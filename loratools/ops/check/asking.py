"""Rules are asked about one subject, and what they observe becomes findings; what they could not, is listed too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from loratools import checks
from loratools.checks.common.observation import Unobserved
from loratools.checks.common.subject import Subject
from loratools.ops.check.report import CheckFinding, NotChecked

_BY_SEVERITY = {"error": 0, "warning": 1, "note": 2}
# What says why something cannot be read where no other rule does, and so has to be asked last.
_LAST = "container-not-read"


class Answers(NamedTuple):
    """What rules say of one subject: findings, errors first, and what they could not look at."""

    findings: tuple[CheckFinding, ...]
    not_checked: tuple[NotChecked, ...]


def answers(subject: Subject, rules: Collection[str]) -> Answers:
    """What the rules say of a subject.

    Args:
        subject: What they look at.
        rules: The ids of those whose findings are wanted. The others are asked too where the source cannot be read, so
            that it is known whether they explain why.
    """
    asked = [id for id in checks.ids() if id != _LAST and (id in rules or subject.error is not None)]
    outcomes = [each for id in asked for each in _said_by(id, subject)]
    if _LAST in rules:
        explained = any(isinstance(each, CheckFinding) and each.severity == "error" for each in outcomes)
        outcomes += _said_by(_LAST, replace(subject, explained=explained))
    wanted = [each for each in outcomes if each.id in rules]
    findings = in_order(each for each in wanted if isinstance(each, CheckFinding))
    return Answers(findings, tuple(each for each in wanted if isinstance(each, NotChecked)))


def in_order(unordered: Iterable[CheckFinding]) -> tuple[CheckFinding, ...]:
    """Errors first, then warnings, then notes; of one severity by family, as they were asked."""
    return tuple(sorted(unordered, key=lambda finding: _BY_SEVERITY[finding.severity]))


def _said_by(id: str, subject: Subject) -> Iterator[CheckFinding | NotChecked]:
    rule = checks.rule(id)
    for each in rule.observe(subject):
        if isinstance(each, Unobserved):
            yield NotChecked(id, each.why, each.names)
        else:
            yield CheckFinding(id, rule.SEVERITY, each.message, each.evidence, each.fix or rule.FIX)
