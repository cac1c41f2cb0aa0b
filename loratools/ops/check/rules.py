"""The rules of `check`, as people list and look them up."""

from __future__ import annotations

from dataclasses import dataclass

from loratools import checks, registry
from loratools.arguments import checked
from loratools.checks import Needs, Severity


@dataclass(frozen=True)
class RuleInfo:
    """A rule of `check`.

    Attributes:
        id: Its stable id, which begins with its family.
        family: Its family, which `select` and `ignore` take as well.
        severity: `error`, `warning` or `note`; a note is no reason to end with 1.
        summary: What it looks for, in one line.
        why: Why that matters.
        fix: What to do about it.
        needs: What has to be read or given for it: `headers`, `values`, `base`, `program` or `others`.
    """

    id: str
    family: str
    severity: Severity
    summary: str
    why: str
    fix: str
    needs: Needs

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `rules` in the document of `loratools explain --json`."""
        return dict(vars(self))


@checked
def list_rules() -> tuple[RuleInfo, ...]:
    """Return the rules of `check`, by family.

    Returns:
        One entry per rule: its id, severity, what it looks for, why that matters, and what to do.

    Example:
        >>> import loratools
        >>> [rule.severity for rule in loratools.list_rules() if rule.id == "container-truncated"]
        ['error']
    """
    return tuple(rule_named(id) for id in checks.ids())


def rule_named(id: str) -> RuleInfo:
    """The rule of this id.

    Raises:
        UsageError: there is none; the nearest ids are named.
    """
    rule = checks.rule(id)
    summary, _, why = registry.description("checks", id).partition("\n")
    return RuleInfo(id, checks.family_of(id), rule.SEVERITY, summary, why.strip(), rule.FIX, rule.NEEDS)
