"""The report of resizing an adapter, with one entry per module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import Adapter
from loratools.notebook_html import notebook_html
from loratools.ops.lowrank.reduce import ReducedModule
from loratools.short_repr import few_lines


@dataclass(frozen=True)
class ResizeReport:
    """The report of resizing an adapter. With `plan`, everything is computed and nothing is written.

    Attributes:
        modules: One entry per module.
        error: The relative Frobenius error over all modules.
        unchanged: How many modules were within the limit already and keep their bytes.
        output: Where the result was written; None if nothing was written.
        adapter: The resulting adapter; None for a plan.
        bytes: Size of the result in bytes.
        warnings: Warnings about the result, as sentences.

    Example:
        >>> import loratools
        >>> report = loratools.resize("fixtures/llama-tiny-science", rank=4)
        >>> 0 <= report.error < 1
        True
    """

    modules: tuple[ReducedModule, ...]
    error: float
    unchanged: int
    output: Path | None
    adapter: Adapter | None
    bytes: int
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools resize --json`, without the fields common to all verbs."""
        return {
            "modules": [m.to_dict() for m in self.modules],
            "error": self.error,
            "unchanged": self.unchanged,
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }
