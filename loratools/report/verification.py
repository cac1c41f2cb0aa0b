"""What a verification tells, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from loratools.ops.verify.files import FilesReport
from loratools.ops.verify.report import Finding, VerifiedTensor, VerifyReport
from loratools.report.groups import grouped
from loratools.report.pairs import pairs
from loratools.report.pictures.of_reports import maps
from loratools.report.text import number, plural

_SHOWN_NAMES = 4
_VERDICTS = {
    "same": "same: every weight is explained by the base and the adapters",
    "different": "different",
    "undecided": "undecided",
}


def verification_tables(report: VerifyReport, *, every: bool = False) -> list[RenderableType]:
    """The verdict with its reasons, and with `every` each weight that the adapters change."""
    verdict, *facts = verification_facts(report)
    rows = [verdict, *_finding_rows(report.diagnosis), *facts]
    tables: list[RenderableType] = [pairs(rows)]
    if every:
        tables.append(pairs(_weight_rows(report.tensors)))
    if report.verdict == "different":
        tables.append(maps(report.charts, "Gain"))
    return tables


def verification_facts(report: VerifyReport) -> list[tuple[str, str]]:
    """Return the verdict and what speaks for it, in pairs of a word and a text, without what is wrong."""
    rows = [("verdict", _VERDICTS[report.verdict])]
    right = sum(count for _, count in report.recipes)
    explained = f"{right} of {plural(len(report.tensors), 'weight')} are explained"
    if report.gain is not None:
        explained += f", and {report.gain:.4%} of the change is in them"
    rows.append(("adapted", explained))
    rows += [("computed as", f"{recipe}  ({plural(count, 'weight')})") for recipe, count in report.recipes]
    if report.merged_by:
        rows.append(("merged by", f"{' or '.join(report.merged_by)}: they compute in this way"))
    if report.replaced:
        rows.append(("replaced", f"{plural(report.replaced, 'weight')} as the adapters have them"))
    cast = f", {report.cast} the same rounded to another dtype" if report.cast else ""
    rows.append(
        ("untouched", f"{plural(report.same, 'weight')} as in the base{cast}, {len(report.different)} different")
    )
    if report.config_changes:
        rows.append(("config", "; ".join(report.config_changes)))
    if report.file_changes:
        rows.append(("files", "; ".join(report.file_changes)))
    return [*rows, ("time", f"{report.seconds:.1f} s")]


def file_tables(report: FilesReport, *, every: bool = False) -> list[RenderableType]:
    """The verdict on the files of an output, with its reasons, and with `every` each file."""
    verdict, *facts = file_facts(report)
    rows = [verdict, *_finding_rows(report.diagnosis), *facts]
    return [pairs(rows), *([pairs([(file.state, file.name) for file in report.files])] if every else [])]


def file_facts(report: FilesReport) -> list[tuple[str, str]]:
    """Return the verdict on the files of an output, in pairs of a word and a text, without what is wrong."""
    unchanged = [file for file in report.files if file.state == "same"]
    verdict: str = "same: every file is as it was written" if report.verdict == "same" else report.verdict
    return [
        ("verdict", verdict),
        ("files", f"{len(unchanged)} of {plural(len(report.files), 'file')} are as they were written"),
        ("time", f"{report.seconds:.1f} s"),
    ]


def _finding_rows(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return [
        (
            "unsure" if finding.undecided else "wrong",
            f"{finding.code}: {finding.message}{f'  {_names(finding.names)}' if finding.names else ''}",
        )
        for finding in findings
    ]


def _weight_rows(tensors: Sequence[VerifiedTensor]) -> list[tuple[str, str]]:
    """One row for each group of weights that were found alike."""
    groups = grouped((t.name, (t.ok, t.recipe, _weights(t)), t) for t in tensors)
    return [
        (
            {True: "ok", False: "wrong", None: "unsure"}[group.items[0].ok],
            f"{group.name}  weight {_weights(group.items[0])}  error {_largest(group.items)}",
        )
        for group in groups
    ]


def _weights(tensor: VerifiedTensor) -> str:
    return ", ".join("-" if w is None else f"{w:.3f}" for w in tensor.weights) or "-"


def _largest(tensors: Sequence[VerifiedTensor]) -> str:
    ratios = [t.max_error_ratio for t in tensors if t.max_error_ratio is not None]
    return f"{number(max(ratios))} of what one rounding allows" if ratios else "not measured"


def _names(names: Sequence[str]) -> str:
    groups = [group.name for group in grouped((name, "", name) for name in names)]
    more = f", and {len(groups) - _SHOWN_NAMES} more" if len(groups) > _SHOWN_NAMES else ""
    return f"[{plural(len(names), 'name')}: {', '.join(groups[:_SHOWN_NAMES])}{more}]"
