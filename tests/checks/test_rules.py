"""Every rule tells its own sample by its id, and speaks neither of its near miss nor of a sample of another rule."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from check_near_misses import NEAR_MISSES
from check_samples import SAMPLES, sound

import loratools
from loratools import checks

PACKAGE = Path(loratools.__file__).parent


def test_every_rule_has_a_sample_and_every_sample_a_rule() -> None:
    assert sorted(SAMPLES) == sorted(rule.id for rule in loratools.list_rules())


@pytest.mark.parametrize("id", sorted(SAMPLES))
def test_rule_tells_its_own_sample_and_no_other_rule_does(id: str, tmp_path: Path) -> None:
    sample = SAMPLES[id](tmp_path)

    report = loratools.check(*sample.sources, **sample.arguments)

    assert {finding.id for finding in report.findings} - sample.also == {id}
    assert sample.also <= {finding.id for finding in report.findings}


def test_every_rule_has_a_near_miss_and_every_near_miss_a_rule() -> None:
    assert sorted(NEAR_MISSES) == sorted(rule.id for rule in loratools.list_rules())


@pytest.mark.parametrize("id", sorted(NEAR_MISSES))
def test_near_miss_does_not_set_off_the_rule_or_another(id: str, tmp_path: Path) -> None:
    near_miss = NEAR_MISSES[id](tmp_path)

    report = loratools.check(*near_miss.sources, **near_miss.arguments)

    assert id not in near_miss.also
    assert id in report.rules
    assert {finding.id for finding in report.findings} == near_miss.also
    # A rule that could not look at its near miss would be silent for that reason.
    assert id not in {each.id for source in report.sources for each in source.not_checked}


@pytest.mark.parametrize("id", sorted(SAMPLES))
def test_finding_names_what_it_is_about_and_what_to_do(id: str, tmp_path: Path) -> None:
    sample = SAMPLES[id](tmp_path)

    findings = [f for f in loratools.check(*sample.sources, **sample.arguments).findings if f.id == id]

    assert all(finding.message and finding.fix for finding in findings)
    assert {finding.severity for finding in findings} == {checks.rule(id).SEVERITY}


def test_sample_without_a_defect_has_no_findings(tmp_path: Path) -> None:
    assert loratools.check(sound(tmp_path)).findings == ()


def test_nothing_of_a_pickle_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    loratools.check(*SAMPLES["pickle-code"](tmp_path).sources)

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", loratools.list_rules(), ids=lambda rule: rule.id)
def test_rule_explains_itself(rule: loratools.RuleInfo) -> None:
    assert rule.family in checks.FAMILIES
    assert rule.summary.endswith(".")
    assert len(rule.why) > 40
    assert not rule.fix.endswith(".")


def test_defects_that_readers_name_are_rules() -> None:
    ids = {rule.id for rule in loratools.list_rules()}

    named = {
        keyword.value.value
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "defect" and isinstance(keyword.value, ast.Constant) and keyword.value.value is not None
    }

    assert len(named) > 10
    assert named <= ids
