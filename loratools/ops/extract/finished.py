"""Decompositions and factors as units of work: set aside when they are done, and taken up again by a run that goes on.

A unit of another device or another kind of processor has another name, since the last bits of its values are others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

from loratools.ops.extract.adapter import factor_tensors, update_of
from loratools.ops.extract.outcomes import Factored
from loratools.ops.extract.pending import Pending
from loratools.ops.finetune.delta import Decomposed, Extracted, Rounding
from loratools.ops.finetune.pairs import Pair
from loratools.storage.scratch import FinishedUnit, WorkStore

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FinishedWork:
    """What is done of an extraction, by pair and rank.

    Attributes:
        store: Where it is set aside.
        computed_on: The device, and the kind of processor.
    """

    store: WorkStore
    computed_on: str

    def factored(self, pair: Pair, rank: int | None) -> Factored | None:
        """The factors of a pair that a killed run has made; `rank`: None if it was for the rule to choose."""
        return _parsed(self.store.finished(self._unit(pair, "factors", rank)), lambda unit: _factored(pair, unit))

    def keep_factored(self, pair: Pair, extracted: Extracted, rank: int | None) -> Factored:
        """Set the factors of a pair aside."""
        measured = {name: getattr(extracted, name) for name in ("rank", "norm", "error", "gap_bound", "gap_estimate")}
        facts = {**measured, "rounding": astuple(extracted.rounding)}
        tensors = factor_tensors(pair, extracted.left, extracted.right)
        stored_factors = self.store.keep(self._unit(pair, "factors", rank), tensors, facts)
        return Factored(update_of(pair, stored_factors, extracted.rank), **measured, rounding=extracted.rounding)

    def pending(self, pair: Pair, search_rank: int) -> Pending | None:
        """The decomposition of a pair up to this rank that a killed run has made."""
        unit = self.store.finished(self._unit(pair, "decomposition", search_rank))
        return _parsed(unit, lambda unit: _pending(unit, search_rank))

    def keep_pending(self, pair: Pair, decomposition: Decomposed, search_rank: int) -> Pending:
        """Set the decomposition of a pair aside, and hold no more of it than its singular values."""
        parts = {i: part for i, part in enumerate(decomposition.parts) if part is not None}
        tensors = {
            f"{name}{i}": getattr(part, name) for i, part in parts.items() for name in ("u", "vt", "s", "values")
        }
        facts = {
            "parts": [
                [part.norm, part.energy, part.error, part.gap_bound, part.gap_estimate, part.passes, part.method]
                if part is not None
                else None
                for part in decomposition.parts
            ],
            "rounding": astuple(decomposition.rounding),
        }
        vectors = self.store.keep(self._unit(pair, "decomposition", search_rank), tensors, facts)
        # Not a slice: that would hold all of it.
        bare = tuple(
            replace(part, u=part.u.new_empty(0), vt=part.vt.new_empty(0)) if part is not None else None
            for part in decomposition.parts
        )
        return Pending(replace(decomposition, parts=bare), vectors, search_rank)

    def norm_of_whole(self, pair: Pair) -> float | None:
        """The norm of the change of a pair whose factors a killed run has found to be larger than the tensor."""
        unit = self.store.finished(self._unit(pair, "size", None))
        return _parsed(unit, lambda unit: float(unit.facts["norm"]))

    def keep_norm_of_whole(self, pair: Pair, norm: float) -> None:
        """Note that the factors of a pair would be larger than the tensor."""
        self.store.keep(self._unit(pair, "size", None), {}, {"norm": norm})

    def _unit(self, pair: Pair, what: str, rank: int | None) -> str:
        return f"{what} of {pair.name}{'' if rank is None else f', rank {rank}'}, {self.computed_on}"


def _parsed(unit: FinishedUnit | None, parse: Callable[[FinishedUnit], _Result]) -> _Result | None:
    """What a unit says; None if there is none, or what was noted of it is not as it is written here."""
    if unit is None:
        return None
    try:
        return parse(unit)
    except (KeyError, TypeError, ValueError):
        return None


def _factored(pair: Pair, unit: FinishedUnit) -> Factored:
    facts: Mapping[str, Any] = unit.facts
    rank = int(facts["rank"])
    norm, error, gap_bound, gap_estimate = (
        float(facts[name]) for name in ("norm", "error", "gap_bound", "gap_estimate")
    )
    rounding = Rounding(*facts["rounding"])
    return Factored(update_of(pair, unit.tensors, rank), rank, norm, error, gap_bound, gap_estimate, rounding)


def _pending(unit: FinishedUnit, search_rank: int) -> Pending:
    import torch

    from loratools.algebra.svd import TruncatedSvd

    empty = torch.empty(0)
    parts: list[TruncatedSvd | None] = []
    for i, measured in enumerate(unit.facts["parts"]):
        if measured is None:
            parts.append(None)
            continue
        s, values = unit.tensors[f"s{i}"].read(), unit.tensors[f"values{i}"].read()
        parts.append(TruncatedSvd(empty, s, empty, values, *measured))
    return Pending(Decomposed(tuple(parts), Rounding(*unit.facts["rounding"])), unit.tensors, search_rank)
