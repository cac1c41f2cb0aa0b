"""A check as JUnit XML, which build servers show as tests: a suite for each source, a failed test for each finding."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from loratools.ops.check.report import CheckedSource, CheckFinding, CheckReport

# What XML 1.0 has no way to write.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: CheckReport) -> str:
    """The report as one document. Notes are tests that pass, with the note as their output."""
    failures = sum(finding.severity != "note" for finding in report.findings)
    suites = ElementTree.Element(
        "testsuites",
        name="loratools check",
        tests=str(sum(max(1, len(source.findings)) for source in report.sources)),
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
        tests=str(max(1, len(source.findings))),
        failures=str(failures),
        errors="0",
        skipped="0",
    )
    for finding in source.findings:
        _case(suite, source, finding)
    if not source.findings:
        ElementTree.SubElement(suite, "testcase", classname=_text(source.path), name="no findings")


def _case(suite: ElementTree.Element, source: CheckedSource, finding: CheckFinding) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=_text(source.path), name=finding.id)
    lines = _text("\n".join([finding.message, *finding.evidence, f"fix: {finding.fix}"]))
    if finding.severity == "note":
        ElementTree.SubElement(case, "system-out").text = lines
    else:
        failure = ElementTree.SubElement(case, "failure", type=finding.severity, message=_text(finding.message))
        failure.text = lines


def _text(text: str) -> str:
    """The text with an escape in the place of every character that XML cannot hold."""
    return _NO_XML.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
