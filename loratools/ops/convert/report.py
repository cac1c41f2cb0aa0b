"""The report of a conversion: the error of each module, and what became of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratools.notebook_html import notebook_html
from loratools.ops.convert.verify import ConvertedModule
from loratools.short_repr import few_lines
from loratools.skipped import Skipped


@dataclass(frozen=True)
class ConvertReport:
    """The report of a conversion.

    Attributes:
        source_format: The format that was read.
        target_format: The format that was written.
        tensors_in: How many tensors the source has.
        tensors_out: How many tensors the result has.
        modules: The error of each module; empty for a plan.
        max_relative_error: The largest relative Frobenius error of `dW x` for random x in a module; None for a plan.
        dropped: What the source has and the result does not.
        kept: Names of metadata entries that are unchanged in the result.
        recomputed: Names of metadata entries that were recomputed for the result.
        bytes: Size of the result in bytes; None if nothing was written.
        output: Where the result was written; None if nothing was written.
        warnings: Warnings about the result, as sentences.

    Example:
        >>> import loratools
        >>> base = "fixtures/llama-tiny"
        >>> report = loratools.convert("fixtures/llama-tiny-science", "as-mlx", format="mlx", base=base)
        >>> report.source_format, report.target_format
        ('peft', 'mlx')
    """

    source_format: str
    target_format: str
    tensors_in: int
    tensors_out: int
    modules: tuple[ConvertedModule, ...]
    max_relative_error: float | None
    dropped: tuple[Skipped, ...]
    kept: tuple[str, ...]
    recomputed: tuple[str, ...]
    bytes: int | None
    output: Path | None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, with its relative error, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [{"name": module.name, "error": module.error} for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools convert --json`, without the fields common to all verbs."""
        return {
            "source_format": self.source_format,
            "target_format": self.target_format,
            "tensors_in": self.tensors_in,
            "tensors_out": self.tensors_out,
            "max_relative_error": self.max_relative_error,
            "modules": self.rows(),
            "dropped": [{"what": d.what, "name": d.name, "why": d.why} for d in self.dropped],
            "metadata": {"kept": list(self.kept), "recomputed": list(self.recomputed)},
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }
