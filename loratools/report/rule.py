"""One rule of `check` for people: what it looks for, why that matters, and what to do."""

from __future__ import annotations

from loratools.ops.check.rules import RuleInfo


def rule_page(rule: RuleInfo) -> str:
    """The page as plain text."""
    needs = {
        "headers": "headers alone",
        "values": "the values, which are read unless --no-values is given",
        "base": "the model that it is for: --base BASE",
        "program": "the program that is to load it: --for PROGRAM",
        "others": "several adapters in one run, and their values",
    }
    return "\n".join(
        [
            f"{rule.id} ({rule.severity}): {rule.summary}",
            "",
            rule.why,
            "",
            f"Needs: {needs[rule.needs]}.",
            f"Fix: {rule.fix}.",
        ]
    )
