"""explain: the page of a rule, and the nearest ids where there is none."""

from __future__ import annotations

import json

import click.testing
import pytest

import loratools
from loratools.cli import verbs


def explain(*args: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(verbs, ["explain", *args])


@pytest.mark.parametrize("rule", loratools.list_rules(), ids=lambda rule: rule.id)
def test_page_says_what_why_and_what_to_do(rule: loratools.RuleInfo) -> None:
    done = explain(rule.id)

    assert done.exit_code == 0
    assert done.stdout.startswith(f"{rule.id} ({rule.severity}): {rule.summary}\n")
    assert rule.why in done.stdout
    assert f"Fix: {rule.fix}." in done.stdout


def test_document_has_the_rule() -> None:
    (entry,) = json.loads(explain("keys-half-pair", "--json").stdout)["rules"]

    assert set(entry) == {"id", "family", "severity", "summary", "why", "fix", "needs"}
    assert (entry["id"], entry["family"], entry["severity"]) == ("keys-half-pair", "keys", "error")


def test_unknown_id_is_answered_with_the_nearest() -> None:
    done = explain("keys-half-pairs")

    assert done.exit_code == 2
    assert "no rule named 'keys-half-pairs'" in done.stderr
    assert "did you mean 'keys-half-pair'?" in done.stderr
