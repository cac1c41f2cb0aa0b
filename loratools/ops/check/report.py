"""The report of a check: the findings of each source, each made by one rule."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.checks import Severity
from loratools.notebook_html import notebook_html
from loratools.short_repr import few_lines, one_line


@dataclass(frozen=True)
class CheckFinding:
    """One problem that a rule found in a source.

    Attributes:
        id: The id of the rule, such as `container-truncated`.
        severity: `error`, `warning` or `note`. Notes do not change the exit code.
        message: What is wrong, with the numbers that show it.
        evidence: The names of the tensors, modules, files or fields that are affected.
        fix: What to do about it.
    """

    id: str
    severity: Severity
    message: str
    evidence: tuple[str, ...]
    fix: str

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `findings` in the document of `loratools check --json`."""
        return {
            "id": self.id,
            "severity": self.severity,
            "message": self.message,
            "evidence": list(self.evidence),
            "fix": self.fix,
        }


@dataclass(frozen=True)
class NotChecked:
    """Something that a rule could not examine, so that it made no finding about it.

    Attributes:
        id: The id of the rule.
        why: Why the rule could not examine it.
        names: The affected modules of the source; empty if all of the source is affected.
    """

    id: str
    why: str
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `not_checked` in the document of `loratools check --json`."""
        return {"id": self.id, "why": self.why, "names": list(self.names)}


@dataclass(frozen=True)
class CheckedSource:
    """An adapter, a model or a broken file that was checked.

    Attributes:
        path: Where it is.
        findings: What was found in it, errors first.
        baselined: How many findings are left out because the baseline lists them.
        not_checked: What rules could not examine, and why.
    """

    path: str
    findings: tuple[CheckFinding, ...]
    baselined: int = 0
    not_checked: tuple[NotChecked, ...] = ()

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `sources` in the document of `loratools check --json`."""
        return {
            "path": self.path,
            "findings": [finding.to_dict() for finding in self.findings],
            "baselined": self.baselined,
            "not_checked": [each.to_dict() for each in self.not_checked],
        }


@dataclass(frozen=True)
class CheckReport:
    """The report of a check.

    Attributes:
        sources: One entry per source. A folder of several has one entry for each adapter, model and broken file.
        rules: The ids of the rules that were applied.

    Example:
        >>> import loratools
        >>> report = loratools.check("fixtures/llama-tiny-science")
        >>> [finding.id for finding in report.findings if finding.severity == "error"]
        []
    """

    sources: tuple[CheckedSource, ...]
    rules: tuple[str, ...]

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    @property
    def findings(self) -> tuple[CheckFinding, ...]:
        """The findings of all sources."""
        return tuple(finding for source in self.sources for finding in source.findings)

    @property
    def exit_code(self) -> int:
        """The exit code of the command line: 1 if there is an error or a warning, else 0."""
        return int(any(finding.severity != "note" for finding in self.findings))

    def rows(self) -> list[dict[str, object]]:
        """Return one row per finding, with the path of its source, for `pandas.DataFrame(report.rows())`."""
        return [{"path": source.path, **finding.to_dict()} for source in self.sources for finding in source.findings]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools check --json`, without the fields common to all verbs."""
        return {"sources": [source.to_dict() for source in self.sources]}
