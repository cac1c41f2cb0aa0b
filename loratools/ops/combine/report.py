"""The report of a combination: each module of the result, and how much of each adapter is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.charts.of_report import report_charts, report_figure
from loratools.notebook_html import notebook_html
from loratools.ops.combine.shares import CombinedModule, Share
from loratools.short_repr import few_lines

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class CombineReport:
    """The report of a combination. With `plan`, everything is computed and nothing is written.

    Attributes:
        modules: One entry per module of the result.
        adapters: How much of each adapter is in the result, in the order given.
        error: Relative Frobenius error of the stored values against the exact combination, over all modules.
        output: Where the result was written; None if nothing was written.
        adapter: The resulting adapter; None for a plan.
        bytes: Size of the result in bytes.
        warnings: Warnings about the result, as sentences.
        recipe: All settings of the combination, as the metadata of the result records them.
        residual: Where the residual adapter was written; None if there is none.
        residual_bytes: Size of the residual adapter in bytes; None if it was not requested.

    Example:
        >>> import loratools
        >>> pair = ["fixtures/llama-tiny-science", "fixtures/llama-tiny-shakespeare"]
        >>> report = loratools.combine(pair, rank=8, plan=True)
        >>> max(module.rank for module in report.modules)
        8
    """

    modules: tuple[CombinedModule, ...]
    adapters: tuple[Share, ...]
    error: float
    output: Path | None
    adapter: Adapter | None
    bytes: int
    warnings: tuple[str, ...] = ()
    recipe: Mapping[str, object] = field(default_factory=dict)
    residual: Path | None = None
    residual_bytes: int | None = None

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html
    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module and adapter, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [
            {**module.without_adapters(), **share.to_dict()} for module in self.modules for share in module.adapters
        ]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools combine --json`, without the fields that every verb's document has."""
        return {
            "modules": [m.to_dict() for m in self.modules],
            "adapters": [a.to_dict() for a in self.adapters],
            "error": self.error,
            "bytes": self.bytes,
            "recipe": dict(self.recipe),
            "warnings": list(self.warnings),
            "residual": str(self.residual) if self.residual is not None else None,
            "residual_bytes": self.residual_bytes,
            "output": str(self.output) if self.output is not None else None,
        }
