"""The report of a combination: what each module and each adapter became."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.adapter import Adapter
from loratools.ops.combine.shares import CombinedModule, Share
from loratools.short_repr import few_lines


@dataclass(frozen=True)
class CombineReport:
    """What a combination did, or of a plan what it would do: all is computed, and nothing written.

    `output` and `residual` are None where nothing was written, `adapter` of a plan. `recipe` is what was asked for, in
    full, and is in the metadata of what was written. `residual_bytes` is the size of what was lost, where a residual
    is asked for.
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

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module and adapter, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [
            {**module.without_adapters(), **share.to_dict()} for module in self.modules for share in module.adapters
        ]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools combine --json`, without its head."""
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
