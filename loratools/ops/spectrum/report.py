"""The report of spectrum: the singular values of each module, and what each rank would keep of all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratools.short_repr import few_lines, one_line
from loratools.skipped import Skipped


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of one module's change, descending, scale included; all of them where `complete`.

    norm            Frobenius, of the whole change.
    stable_rank     `||M||_F^2 / ||M||_2^2`.
    effective_rank  Roy and Vetterli's; with values unknown an estimate, mostly from above.
    numerical_rank  how many singular values rounding to the stored dtype cannot have made up; None where more than
                    are known may be.
    noise_edge      of a pair: the largest singular value of its rounding noise; `above_edge`: how many exceed it.
    optimal_cut     of a pair: Gavish and Donoho's for that noise; `above_cut`: how many exceed it.
    identical       of a pair: share of weights that are bit for bit the base's.
    cost            parameters of one unit of rank.
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

    def __repr__(self) -> str:
        return one_line(self)

    def energy(self, rank: int) -> float:
        """Share of the squared norm that a rank keeps."""
        kept = math.fsum(s * s for s in self.singular_values[:rank])
        if (self.complete and rank >= len(self.singular_values)) or not (self.norm**2):
            return 1.0
        return min(1.0, kept / self.norm**2)

    def to_dict(self) -> dict[str, object]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass(frozen=True)
class RankRow:
    """What one rank for all modules keeps: share of the energy, relative Frobenius error, the module that comes off
    worst, and the size of the file. `energy_shared`: the same size shared out by singular values (`--max-params`)."""

    rank: int
    energy: float
    error: float
    worst_module: str
    worst_energy: float
    bytes: int
    energy_shared: float


@dataclass(frozen=True)
class SpectrumReport:
    """`knee`: the rank beyond which there is little to gain, None where the spectrum has no such place; `why` says so
    either way."""

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

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools spectrum --json`, without its head."""
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
