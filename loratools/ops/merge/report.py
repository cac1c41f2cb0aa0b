"""The report of a merge, in total and per weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.charts.of_report import report_charts, report_figure
from loratools.notebook_html import notebook_html
from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.rounding import RoundingMode
from loratools.short_repr import few_lines, one_line

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class MergedTensor:
    """The result of a merge for one weight.

    Attributes:
        name: The name of the weight.
        adapters: Positions of the adapters that changed it, from 0, in the order given.
        gain: `<merged - base, dW> / <dW, dW>`; None if it was replaced.
        max_error_ratio: The largest error in the rows that were checked, as a share of the allowed error; None if
            nothing was checked.
    """

    name: str
    adapters: tuple[int, ...]
    gain: float | None
    max_error_ratio: float | None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class RequantizedTensor:
    """A merged weight that is stored in the quantisation scheme of the base again.

    Attributes:
        name: The name of the weight.
        scheme: Its scheme and number format, such as `bitsandbytes: nf4`.
        error_before: `||stored - sum|| / ||update||` if the sum were stored in the float dtype of the weight, as with
            `dequantize`; None if the update is zero.
        error_after: The same ratio for the requantised values.
        gain: The share of the update that is in the result.
    """

    name: str
    scheme: str
    error_before: float | None
    error_after: float | None
    gain: float | None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class MergeReport:
    """The report of a merge.

    For a plan, `output` is None and nothing is measured. Shares and ratios are None if there was nothing to measure.

    `gain` and `unchanged_share` are measured on every block of 49,152 weights if a unit of work (32 MiB) has up to 16
    blocks, and on every fourth block if it has more. `max_error_ratio` covers nine rows of each unit.

    Attributes:
        output: Where the result was written; None if nothing was written.
        adapters: Each adapter as the caller named it, and its weight.
        tensors: One entry per changed weight.
        merged_weights: How many weights had a delta added.
        untouched: How many weights were copied unchanged, or only dequantised.
        replaced: How many weights were replaced.
        added: Names of weights that the base does not have.
        dequantized: Names of quantised weights that are written as floats.
        bytes: Size of the result in bytes.
        seconds: Wall-clock time in seconds.
        gain: `<merged - base, dW> / <dW, dW>` over all changed weights.
        unchanged_share: The share of the values in changed weights that are equal to the base's.
        max_error_ratio: The largest error in the rows that were checked, as a share of the allowed error.
        verified: Whether rows were read back and checked.
        left_out: Names in the adapters that do not fit the base and were left out with `allow_partial`.
        warnings: Warnings about the result, as sentences.
        rounding: How sums were rounded to the stored dtype.
        requantized: One entry per weight that was quantised again.
        trained_on: How the base was quantised in training; None if that was not given.
        plan: The plan; None if the merge was carried out.

    Example:
        >>> import loratools
        >>> report = loratools.merge("fixtures/llama-tiny", "fixtures/llama-tiny-science", "merged-model")
        >>> report.verified, report.max_error_ratio <= 1
        (True, True)
    """

    output: Path | None
    adapters: tuple[tuple[str, float], ...]
    tensors: tuple[MergedTensor, ...]
    merged_weights: int
    untouched: int
    replaced: int
    added: tuple[str, ...]
    dequantized: tuple[str, ...]
    bytes: int
    seconds: float
    gain: float | None
    unchanged_share: float | None
    max_error_ratio: float | None
    verified: bool
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    rounding: RoundingMode = "nearest"
    requantized: tuple[RequantizedTensor, ...] = ()
    trained_on: str | None = None
    plan: MergePlan | None = None

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html
    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per changed weight, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [
            {"name": t.name, "adapters": list(t.adapters), "gain": t.gain, "max_error_ratio": t.max_error_ratio}
            for t in self.tensors
        ]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools merge --json`, or of `--plan --json`, without the fields common to all
        verbs.
        """
        if self.plan is not None:
            return self.plan.to_dict()
        return {
            "adapters": [{"path": path, "weight": weight} for path, weight in self.adapters],
            "targets": self.merged_weights,
            "untouched": self.untouched,
            "replaced": self.replaced,
            "added": list(self.added),
            "dequantized": list(self.dequantized),
            "requantized": [
                {
                    "name": t.name,
                    "scheme": t.scheme,
                    "error_before": t.error_before,
                    "error_after": t.error_after,
                    "gain": t.gain,
                }
                for t in self.requantized
            ],
            "rounding": self.rounding,
            "trained_on": self.trained_on,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gain": self.gain,
            "unchanged_share": self.unchanged_share,
            "max_error_ratio": self.max_error_ratio,
            "verified": self.verified,
            "tensors": self.rows(),
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
            "output": str(self.output),
        }
