"""A check as SARIF 2.1.0, which code hosts show beside the files.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from loratools._version import __version__
from loratools.ops.check.report import CheckedSource, CheckFinding, CheckReport, NotChecked
from loratools.ops.check.rules import RuleInfo, rule_named

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(report: CheckReport) -> str:
    """The report as one run of one tool: a rule for each that was asked, a result for each finding.

    What a rule could not look at is a notification of the run: SARIF has results for what a tool has looked at.
    """
    index = {id: at for at, id in enumerate(report.rules)}
    driver = {
        "name": "loratools",
        "version": __version__,
        "rules": [_rule(rule_named(id)) for id in report.rules],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(report, index)],
        "results": [
            _result(source, finding, index[finding.id]) for source in report.sources for finding in source.findings
        ],
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(rule: RuleInfo) -> dict[str, object]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.fix},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"tags": [rule.family]},
    }


def _invocation(report: CheckReport, index: Mapping[str, int]) -> dict[str, object]:
    notifications = [_notification(source, each, index) for source in report.sources for each in source.not_checked]
    return {
        # Findings are no failure of the tool.
        "executionSuccessful": True,
        "exitCode": report.exit_code,
        "toolExecutionNotifications": notifications,
    }


def _notification(source: CheckedSource, not_checked: NotChecked, index: Mapping[str, int]) -> dict[str, object]:
    lines = [f"not checked: {not_checked.why}", *(f"  {name}" for name in not_checked.names)]
    return {
        "associatedRule": {"id": not_checked.id, "index": index[not_checked.id]},
        "level": "note",
        "message": {"text": "\n".join(lines)},
        "locations": [_location(source)],
    }


def _result(source: CheckedSource, finding: CheckFinding, index: int) -> dict[str, object]:
    lines = [finding.message, *(f"  {line}" for line in finding.evidence), f"fix: {finding.fix}"]
    identity = "\0".join((source.path, finding.id, finding.message))
    return {
        "ruleId": finding.id,
        "ruleIndex": index,
        "level": finding.severity,
        "message": {"text": "\n".join(lines)},
        "locations": [_location(source)],
        # So that the same finding is known again in the next run.
        "partialFingerprints": {"loratools/v1": hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()},
    }


def _location(source: CheckedSource) -> dict[str, object]:
    return {"physicalLocation": {"artifactLocation": {"uri": _uri(source.path)}}}


def _uri(path: str) -> str:
    """A path as SARIF has it: relative to where the program was called, or absolute."""
    if Path(path).is_absolute():
        return Path(path).as_uri()
    return quote(Path(path).as_posix())
