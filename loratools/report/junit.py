"""A check as JUnit XML, which build servers show as tests.

A suite for each source, a failed test for each finding, and a skipped test for each rule that could not look at a part
of the source.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from loratools.ops.check.report import CheckedSource, CheckFinding, CheckReport, NotChecked

# What XML 1.0 has no way to write.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: CheckReport) -> str:
    """The report as one document. Notes are tests that pass, with the note as their output."""
    failures = sum(finding.severity != "note" for finding in report.findings)
    suites = ElementTree.Element(
        "testsuites",
        name="loratools check",
        tests=str(sum(map(_case_count, report.sources))),
        failures=str(failures),
        errors="0",
    )
    for source in report.sources:
        _suite(suites, source)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode")


def _suite(suites: ElementTree.Element, source: CheckedSource) -> None:
    failures = sum(finding.severity != "note" for finding in source.findings)
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        name=_text(source.path),
        tests=str(_case_count(source)),
        failures=str(failures),
        errors="0",
        skipped=str(len(source.not_checked)),
    )
    for finding in source.findings:
        _case(suite, source, finding)
    if not source.findings:
        ElementTree.SubElement(suite, "testcase", classname=_text(source.path), name="no findings")
    for not_checked in source.not_checked:
        _skipped_case(suite, source, not_checked)


def _case_count(source: CheckedSource) -> int:
    return max(1, len(source.findings)) + len(source.not_checked)


def _case(suite: ElementTree.Element, source: CheckedSource, finding: CheckFinding) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_text(source.path), name=finding.id)
    lines = _text("\n".join([finding.message, *finding.evidence, f"fix: {finding.fix}"]))
    if finding.severity == "note":
        ElementTree.SubElement(case, "system-out").text = lines
    else:
        failure = ElementTree.SubElement(case, "failure", type=finding.severity, message=_text(finding.message))
        failure.text = lines


def _skipped_case(suite: ElementTree.Element, source: CheckedSource, not_checked: NotChecked) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_text(source.path), name=not_checked.id)
    skipped = ElementTree.SubElement(case, "skipped", message=_text(f"not checked: {not_checked.why}"))
    if not_checked.names:
        skipped.text = _text("\n".join(not_checked.names))


def _text(text: str) -> str:
    """The text with an escape in the place of every character that XML cannot hold."""
    return _NO_XML.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
