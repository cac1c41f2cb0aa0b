"""The report of a verification: a verdict, the differences in words, and numbers per weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from loratools.charts.of_report import report_charts, report_figure
from loratools.notebook_html import notebook_html
from loratools.short_repr import few_lines, one_line

if TYPE_CHECKING:
    pass

Verdict: TypeAlias = Literal["same", "different", "undecided"]
EXIT_CODES: Mapping[Verdict, int] = {"same": 0, "different": 1, "undecided": 3}


@dataclass(frozen=True)
class Finding:
    """One problem of a merged model, or one question that cannot be decided.

    Attributes:
        code: A stable name of the defect, such as `scale-ignored`.
        message: The problem in words, with the numbers that show it.
        names: The affected weights or files.
        undecided: Whether this finding is no error, and only prevents the verdict `same`.
    """

    code: str
    message: str
    names: tuple[str, ...] = ()
    undecided: bool = False

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `diagnosis` in the JSON document."""
        return {
            "code": self.code,
            "message": self.message,
            "names": list(self.names),
            "undecided": self.undecided,
        }


@dataclass(frozen=True)
class VerifiedTensor:
    """A weight that the adapters change, with its values in the merged model.

    Attributes:
        name: The name of the weight.
        recipe: The name of the recipe that gives its values; None if no known recipe does.
        max_error_ratio: The largest error of sampled rows against `base + delta` in float64, as a share of the error
            that one rounding allows; None if it was not measured.
        weights: For each adapter that changes this weight, the least-squares factor of its delta in the merged model,
            as a share of the given weight. 1 means that it was applied as given.
        gain: The share of the summed delta that is in the merged model, `<merged - base, dW> / <dW, dW>`.
        ok: Whether the values are explained; None if that cannot be decided.
    """

    name: str
    recipe: str | None
    max_error_ratio: float | None
    weights: tuple[float | None, ...]
    gain: float | None
    ok: bool | None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `tensors` in the JSON document."""
        return {
            "name": self.name,
            "recipe": self.recipe,
            "max_error_ratio": self.max_error_ratio,
            "weight": self.weights[0] if len(self.weights) == 1 else None,
            "weights": list(self.weights),
            "gain": self.gain,
            "ok": self.ok,
        }


@dataclass(frozen=True)
class VerifyReport:
    """The report of a verification: whether a merged model is its base plus its adapters.

    Attributes:
        merged: The model that was verified.
        verdict: `same`, `different` or `undecided`.
        diagnosis: What is wrong or cannot be decided; empty if nothing is.
        recipes: The recipes that explain adapted weights, with the number of weights that each explains.
        merged_by: The programs that follow exactly these recipes; empty if none is known.
        tensors: The weights that the adapters change.
        replaced: How many weights have the replacement values of an adapter.
        same: How many weights that no adapter changes are identical to the base's byte for byte.
        cast: How many of those are the base's values rounded to another dtype.
        different: The names of those with other values.
        missing: Names of weights that the merged model lacks.
        unexplained: Names of weights that are neither in the base nor in an adapter.
        config_changes: Fields of `config.json` that differ from the base's, as `field: base -> merged`.
        file_changes: Other files, such as tokenizers, that differ from the base's.
        gain: The share of all deltas that is in the merged model; None if nothing was measured.
        sample: The share of the values that was compared; 1 for all.
        seconds: Wall-clock time in seconds.
        warnings: Warnings about the result, as sentences.

    Example:
        >>> import loratools
        >>> _ = loratools.merge("fixtures/llama-tiny", "fixtures/llama-tiny-science", "merged-model-2")
        >>> report = loratools.verify("merged-model-2", "fixtures/llama-tiny", "fixtures/llama-tiny-science")
        >>> report.verdict, report.exit_code
        ('same', 0)
    """

    merged: Path
    verdict: Verdict
    diagnosis: tuple[Finding, ...]
    recipes: tuple[tuple[str, int], ...]
    merged_by: tuple[str, ...]
    tensors: tuple[VerifiedTensor, ...]
    replaced: int
    same: int
    cast: int
    different: tuple[str, ...]
    missing: tuple[str, ...]
    unexplained: tuple[str, ...]
    config_changes: tuple[str, ...]
    file_changes: tuple[str, ...]
    gain: float | None
    sample: float
    seconds: float
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    @property
    def exit_code(self) -> int:
        """The exit code of the verdict: 0 for `same`, 1 for `different`, 3 for `undecided`."""
        return EXIT_CODES[self.verdict]

    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per adapted weight, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [tensor.to_dict() for tensor in self.tensors]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools verify --json`, without the fields common to all verbs."""
        return {
            "merged": str(self.merged),
            "verdict": self.verdict,
            "diagnosis": [finding.to_dict() for finding in self.diagnosis],
            "recipe": self.recipes[0][0] if len(self.recipes) == 1 else None,
            "merged_by": list(self.merged_by),
            "recipes": [{"recipe": name, "weights": count} for name, count in self.recipes],
            "tensors": self.rows(),
            "replaced": self.replaced,
            "untouched": {"same": self.same, "cast": self.cast, "different": list(self.different)},
            "missing": list(self.missing),
            "unexplained": list(self.unexplained),
            "config_changes": list(self.config_changes),
            "file_changes": list(self.file_changes),
            "gain": self.gain,
            "sample": self.sample,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }
