"""Whether a merged model is its base plus its adapters, or its files are as they were written."""

from __future__ import annotations

from loratools.ops.verify.files import FilesReport
from loratools.ops.verify.report import Finding, VerifyReport
from loratools.pages.parts.contents import Contents, Remark, table, tables, warnings
from loratools.report.fields import Field, several, text_field
from loratools.report.text import size
from loratools.report.verification import file_facts, verification_facts

_STATES = {True: "explained", False: "wrong", None: "undecided"}
_TENSORS = (
    text_field("name", "weight"),
    text_field("state"),
    text_field("recipe", "computed as"),
    Field("weights", "weight in the model, of the one given", several),
    Field("gain", "gain", "{:.4%}".format),
    Field("max_error_ratio", "largest error, of what one rounding may cost", "{:.3f}".format),
)
_NAMES = (text_field("name", "weight"), text_field("what"))
_FILES = (
    text_field("name", "file"),
    text_field("state"),
    Field("bytes", "size", size),
    Field("recorded_bytes", "recorded size", size),
    text_field("sha256", "SHA-256"),
)


def contents(report: VerifyReport | FilesReport) -> Contents:
    """Return what the page of a verification shows."""
    if isinstance(report, FilesReport):
        return Contents(
            title=f"Verification of the files of {report.merged}: {report.verdict}",
            facts=tuple(file_facts(report)),
            remarks=tuple(map(_remark, report.diagnosis)),
            tables=tables(table("Files", _FILES, report.rows())),
        )
    tensors = [{**row, "state": _STATES[tensor.ok]} for row, tensor in zip(report.rows(), report.tensors, strict=True)]
    others = [{"name": name, "what": "differs from the base"} for name in report.different]
    others += [{"name": name, "what": "missing"} for name in report.missing]
    others += [{"name": name, "what": "in neither base nor adapter"} for name in report.unexplained]
    return Contents(
        title=f"Verification of {report.merged}: {report.verdict}",
        facts=tuple(verification_facts(report)),
        remarks=(*map(_remark, report.diagnosis), *warnings(report.warnings)),
        tables=tables(
            table("Weights that the adapters change", _TENSORS, tensors),
            table("Other weights that are not as they should be", _NAMES, others),
        ),
    )


def _remark(finding: Finding) -> Remark:
    names = f" [{', '.join(finding.names)}]" if finding.names else ""
    return Remark("warning" if finding.undecided else "error", f"{finding.code}: {finding.message}{names}")
