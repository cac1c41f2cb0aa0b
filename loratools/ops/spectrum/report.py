"""The report of spectrum: the singular values of each module, and what each rank keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.charts.of_report import report_charts, report_figure
from loratools.notebook_html import notebook_html
from loratools.short_repr import few_lines, one_line
from loratools.skipped import Skipped

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of the change of one module, scale included.

    Attributes:
        name: The name of the module.
        shape: The shape of the weight.
        singular_values: Singular values in descending order; only the largest ones unless `complete`.
        complete: Whether these are all singular values.
        norm: The Frobenius norm of the whole change.
        stable_rank: `||M||_F^2 / ||M||_2^2` of the change M.
        effective_rank: The effective rank of Roy and Vetterli (2007); an estimate, usually from above, unless
            `complete`.
        numerical_rank: How many singular values are larger than rounding to the stored dtype can produce; None if there
            may be more than are known.
        cost: Parameters per unit of rank.
        noise_edge: For two checkpoints: the largest singular value of the noise from rounding and from quantisation.
        above_edge: For two checkpoints: how many singular values exceed `noise_edge`.
        optimal_cut: For two checkpoints: the optimal threshold of Gavish and Donoho (2014) for that noise.
        above_cut: For two checkpoints: how many singular values exceed `optimal_cut`.
        identical: For two checkpoints: the share of weights that are bit for bit equal to the base's.
        quantization_error: For two checkpoints: the estimated norm of the quantisation error of both models; None if
            neither is quantised.
    """

    name: str
    shape: tuple[int, ...]
    singular_values: tuple[float, ...]
    complete: bool
    norm: float
    stable_rank: float
    effective_rank: float
    numerical_rank: int | None
    cost: int
    noise_edge: float | None = None
    above_edge: int | None = None
    optimal_cut: float | None = None
    above_cut: int | None = None
    identical: float | None = None
    quantization_error: float | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def energy(self, rank: int) -> float:
        """Return the share of the squared Frobenius norm that a rank keeps.

        Args:
            rank: The rank.

        Returns:
            The share, from 0 to 1.
        """
        squares = math.fsum(s * s for s in self.singular_values[:rank])
        if (self.complete and rank >= len(self.singular_values)) or not (self.norm**2):
            return 1.0
        return min(1.0, squares / self.norm**2)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `modules` in the document of `loratools spectrum --json`."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass(frozen=True)
class RankRow:
    """What one rank for all modules keeps and costs.

    Attributes:
        rank: The rank.
        energy: The share of the squared norm that it keeps.
        error: The relative Frobenius error.
        worst_module: The name of the module that loses the largest share.
        worst_energy: The share of its squared norm that this module keeps.
        bytes: Size of the adapter file in bytes.
        energy_shared: The share of the squared norm that a file of the same size keeps if the ranks are distributed by
            singular values (`max_params`).
    """

    rank: int
    energy: float
    error: float
    worst_module: str
    worst_energy: float
    bytes: int
    energy_shared: float


@dataclass(frozen=True)
class SpectrumReport:
    """The singular values of an adapter, or of the change between two checkpoints.

    Attributes:
        source: The adapter or the fine-tuned model, as the caller named it.
        base: The base model, as the caller named it; None for an adapter.
        dtype: The dtype that sizes are computed for.
        modules: One entry per module.
        table: What each rank keeps and costs.
        knee: The rank beyond which little is gained; None if the spectrum has no knee.
        why: Why the knee is there, or why there is none.
        unchanged: How many tensors are identical byte for byte.
        skipped: Tensors that have no spectrum, and why.
        warnings: Warnings about the result, as sentences.

    Example:
        >>> import loratools
        >>> report = loratools.spectrum("fixtures/llama-tiny-science")
        >>> module = report.modules[0]
        >>> module.complete, round(module.energy(16), 6)
        (True, 1.0)
    """

    source: str
    base: str | None
    dtype: str
    modules: tuple[ModuleSpectrum, ...]
    table: tuple[RankRow, ...]
    knee: int | None
    why: str
    unchanged: int
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html
    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools spectrum --json`, without the fields common to all verbs."""
        return {
            "source": self.source,
            "base": self.base,
            "dtype": self.dtype,
            "modules": [m.to_dict() for m in self.modules],
            "table": [vars(row) for row in self.table],
            "knee": {"rank": self.knee, "why": self.why},
            "unchanged": self.unchanged,
            "skipped": [{"name": skipped.name, "why": skipped.why} for skipped in self.skipped],
            "warnings": list(self.warnings),
        }
