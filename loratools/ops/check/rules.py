"""The rules of `check`, as `loratools explain` lists and explains them."""

from __future__ import annotations

from dataclasses import dataclass

from loratools import checks, registry
from loratools.arguments import checked
from loratools.checks import Needs, Severity


@dataclass(frozen=True)
class RuleInfo:
    """One rule of `check`.

    Attributes:
        id: Its stable id, which begins with its family.
        family: Its family, which `select` and `ignore` take as well.
        severity: `error`, `warning` or `note`. Notes do not change the exit code.
        summary: What it looks for, in one line.
        why: Why it matters.
        fix: What to do about it.
        needs: What the rule needs besides the source: `headers`, `values`, `base`, `program` or `others` (other
            sources).
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
    """Return the rules of `check`, sorted by family.

    Returns:
        One entry per rule: its id, severity, what it looks for, why it matters, and what to do about it.

    Example:
        >>> import loratools
        >>> [rule.severity for rule in loratools.list_rules() if rule.id == "container-truncated"]
        ['error']
    """
    return tuple(rule_named(id) for id in checks.ids())


def rule_named(id: str) -> RuleInfo:
    """The rule with this id.

    Raises:
        UsageError: There is no such rule. The message names the nearest ids.
    """
    rule = checks.rule(id)
    summary, _, why = registry.description("checks", id).partition("\n")
    return RuleInfo(id, checks.family_of(id), rule.SEVERITY, summary, why.strip(), rule.FIX, rule.NEEDS)
