"""The report of an extraction, or of its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter, Replacement
from loratools.charts.of_report import report_charts, report_figure
from loratools.notebook_html import notebook_html
from loratools.ops.extract.cost import Cost, cost_of
from loratools.ops.extract.outcomes import Factored, Outcome, Unchanged
from loratools.ops.extract.settings import Settings
from loratools.ops.extract.treatment import SKIPPED, declared_if_replaced, gets_factors, no_factors
from loratools.ops.finetune.delta import Rounding
from loratools.ops.finetune.pairs import Pair, Pairs
from loratools.short_repr import few_lines
from loratools.skipped import Skipped
from loratools.tensors.dtypes import DTYPE_BITS

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ExtractedModule:
    """The rank and the error of one extracted module. Measured numbers are None in a plan.

    Attributes:
        name: The name of the module.
        rank: The stored rank; None in a plan if the rank depends on values.
        shape: The shape of the weight.
        energy: The share of `norm` squared that the stored factors keep.
        error: The relative Frobenius error of the stored factors.
        gap_bound: An upper bound of the additional energy that the best decomposition of this rank would capture.
        gap_estimate: An estimate of that additional energy.
        norm: The Frobenius norm of the change.
        identical: The share of weights that are bit for bit equal to the base's.
        noise_edge: The largest singular value that rounding to the tuned dtype, and quantisation of either model, can
            produce.
        quantization_error: The estimated Frobenius norm of the quantisation error of both models; None if neither is
            quantised.
    """

    name: str
    rank: int | None
    shape: tuple[int, ...] = ()
    energy: float | None = None
    error: float | None = None
    gap_bound: float | None = None
    gap_estimate: float | None = None
    norm: float | None = None
    identical: float | None = None
    noise_edge: float | None = None
    quantization_error: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `modules` in the document of `loratools extract --json`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Replaced:
    """A tensor that the adapter stores in full.

    Attributes:
        name: The name of the tensor.
        declared: How the adapter declares it, as in `adapter.Replacement`.
        shape: Its shape.
        bytes: Its size in bytes.
        norm: The Frobenius norm of its change; None if the base does not have it.
        share: Its share of the squared norm of all changes; None if the base does not have it.
    """

    name: str
    declared: str
    shape: tuple[int, ...]
    bytes: int
    norm: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class ExtractReport:
    """The report of an extraction.

    Attributes:
        modules: One entry per extracted module.
        energy: The share of the squared norm of the changes of these modules that the factors keep.
        error: The relative Frobenius error over these modules.
        change_captured: The share of the squared norm of all changes that the adapter keeps.
        identical: The share of the weights of changed modules that are bit for bit equal to the base's.
        quantization_error: The estimated norm of the quantisation error of these modules, relative to the norm of their
            changes; None if neither model is quantised.
        skipped: Tensors that changed and are not in the adapter.
        replacements: Tensors that the adapter stores in full.
        unchanged: How many tensors are identical byte for byte; None in a plan.
        output: Where the result was written; None if nothing was written.
        adapter: The resulting adapter; None for a plan.
        bytes: Size of the result in bytes.
        warnings: Warnings about the result, as sentences.
        cost: The expected time and memory; None if this is not a plan.

    Example:
        >>> import loratools
        >>> report = loratools.extract("fixtures/bert-tiny", "fixtures/bert-tiny-tuned", rank=2)
        >>> report.output is None, {module.rank for module in report.modules}
        (True, {2})
    """

    modules: tuple[ExtractedModule, ...]
    energy: float | None
    error: float | None
    change_captured: float | None
    identical: float | None
    skipped: tuple[Skipped, ...]
    replacements: tuple[Replaced, ...]
    unchanged: int | None
    output: Path | None
    adapter: Adapter | None
    bytes: int | None
    warnings: tuple[str, ...] = ()
    cost: Cost | None = None
    quantization_error: float | None = None

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html
    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per extracted module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools extract --json`, without the fields common to all verbs."""
        plan = {} if self.cost is None else {"memory": self.cost.memory, "seconds_estimate": self.cost.seconds}
        return {
            "modules": self.rows(),
            "energy": self.energy,
            "error": self.error,
            "change_captured": self.change_captured,
            "identical": self.identical,
            "quantization_error": self.quantization_error,
            "skipped": [{"name": s.name, "why": s.why, "norm": s.norm, "share": s.share} for s in self.skipped],
            "unchanged": self.unchanged,
            "replacements": [
                {f: getattr(r, f) for f in ("name", "declared", "shape", "bytes", "norm", "share")}
                for r in self.replacements
            ],
            "bytes": self.bytes,
            **plan,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


def reported(
    pairs: Pairs,
    results: Mapping[Pair, Outcome],
    factors: Mapping[Pair, Factored],
    replaced: Mapping[str, tuple[Replacement, float | None]],
    skipped: Sequence[Skipped],
    everything: float,
    adapter: Adapter,
) -> ExtractReport:
    """The measurements put together; `everything` is the squared norm of all changes."""
    modules = [
        ExtractedModule(
            name=p.target,
            rank=e.rank,
            shape=p.base.shape,
            energy=max(0.0, 1 - e.error**2),
            error=e.error,
            gap_bound=e.gap_bound,
            gap_estimate=e.gap_estimate,
            norm=e.norm,
            identical=e.rounding.identical / max(1, e.rounding.elements),
            noise_edge=e.rounding.edge(p.matrices[1:]),
            quantization_error=e.rounding.quantisation_norm,
        )
        for p, e in factors.items()
    ]
    total = math.fsum(e.norm**2 for e in factors.values())
    lost = math.fsum((e.norm * e.error) ** 2 for e in factors.values())
    replaced_square = math.fsum(n**2 for _, n in replaced.values() if n is not None)
    elements = sum(e.rounding.elements for e in factors.values())
    replaced_weights = [
        Replaced(name, r.declared, r.tensor.shape, r.tensor.nbytes, n, n**2 / everything if n is not None else None)
        for name, (r, n) in replaced.items()
    ]
    return ExtractReport(
        modules=tuple(sorted(modules, key=_name)),
        energy=max(0.0, 1 - lost / total) if total else None,
        error=math.sqrt(lost / total) if total else None,
        change_captured=max(0.0, (total - lost + replaced_square) / everything) if everything else None,
        identical=sum(e.rounding.identical for e in factors.values()) / elements if elements else None,
        skipped=tuple(skipped),
        replacements=tuple(sorted(replaced_weights, key=_name)),
        unchanged=sum(isinstance(r, Unchanged) for r in results.values()),
        output=None,
        adapter=None,
        bytes=sum(t.nbytes for t in adapter.tensors().values()),
        quantization_error=_share_of_quantisation([e.rounding for e in factors.values()], total),
    )


def _share_of_quantisation(roundings: Sequence[Rounding], total: float) -> float | None:
    """The norm of all quantisation errors, relative to the root of `total`, the squared norm of all changes."""
    norms = [norm for rounding in roundings if (norm := rounding.quantisation_norm) is not None]
    return math.sqrt(math.fsum(norm**2 for norm in norms) / total) if norms and total else None


def planned(pairs: Pairs, settings: Settings, workers: int, warnings: Sequence[str]) -> ExtractReport:
    """What would be extracted, from headers alone."""
    declared_of = {p: declared for p in pairs.pairs if (declared := declared_if_replaced(p, settings)) is not None}
    chosen = [p for p in pairs.pairs if gets_factors(p, settings)]
    ranks = [settings.policy.planned(min(p.matrices[1:])) for p in chosen]
    modules = [ExtractedModule(p.target, rank, p.base.shape) for p, rank in zip(chosen, ranks, strict=True)]
    replaced = [Replaced(p.name, declared, p.tuned.shape, p.tuned.nbytes) for p, declared in declared_of.items()]
    replaced += [Replaced(a.name, a.declared, a.tensor.shape, a.tensor.nbytes) for a in pairs.unpaired if a.declared]
    nbytes = None
    if all(rank is not None for rank in ranks):
        per_rank = [count * (rows + columns) for count, rows, columns in (p.matrices for p in chosen)]
        stored = sum((rank or 0) * cost for rank, cost in zip(ranks, per_rank, strict=True))
        nbytes = stored * DTYPE_BITS[settings.dtype] // 8 + sum(r.bytes for r in replaced)
    skipped = [Skipped(p.name, p.why) for p in pairs.pairs if p.why is not None]
    skipped += [Skipped(p.name, SKIPPED) for p in pairs.pairs if p not in declared_of and no_factors(p, settings)]
    skipped += [Skipped(a.name, a.why) for a in pairs.unpaired if a.declared is None]
    return ExtractReport(
        modules=tuple(modules),
        energy=None,
        error=None,
        change_captured=None,
        identical=None,
        skipped=tuple(sorted(skipped, key=_name)),
        replacements=tuple(sorted(replaced, key=_name)),
        unchanged=None,
        output=None,
        adapter=None,
        bytes=nbytes,
        warnings=tuple(warnings),
        cost=cost_of(pairs.pairs, settings.policy, workers),
    )


def _name(entry: Skipped | Replaced | ExtractedModule) -> str:
    return entry.name
