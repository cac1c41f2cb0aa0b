"""A module of a combination as a unit of work: what is set aside of it, and what a run that goes on makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from loratools.ops.combine.modules import WeightedUpdate
from loratools.ops.combine.one_module import ModuleResult, with_adapters
from loratools.ops.combine.shares import Part
from loratools.ops.lowrank.finished import FinishedModules
from loratools.ops.lowrank.reduce import ReducedModule
from loratools.updates.parts.protocol import Update

# By these names the updates of a module are set aside.
_STORED, _LOST = "stored", "lost"


def finished_module(finished: FinishedModules, name: str, updates: Sequence[WeightedUpdate]) -> ModuleResult | None:
    """The result of a module that a killed run has combined; None where it must be combined."""
    module = finished.finished(name, _inputs(updates))
    if module is None:
        return None
    try:
        line = ReducedModule(name, *module.facts["line"])
        parts = tuple(
            Part(*[*numbers, tuple((shared, random) for shared, random in overlaps)])
            for *numbers, overlaps in module.facts["parts"]
        )
        return ModuleResult(module.updates[_STORED], with_adapters(line, parts), parts, module.updates.get(_LOST))
    except (KeyError, TypeError, ValueError):
        return None  # not as it is written here


def keep_module(finished: FinishedModules, name: str, updates: Sequence[WeightedUpdate], result: ModuleResult) -> None:
    """Set the result of a module aside; raises MachineError."""
    computed = {_STORED: result.update} if result.lost is None else {_STORED: result.update, _LOST: result.lost}
    facts = {"line": result.line.numbers, "parts": [astuple(part) for part in result.parts]}
    finished.keep(name, _inputs(updates), computed, facts)


def _inputs(updates: Sequence[WeightedUpdate]) -> list[Update]:
    return [u.update for u in updates]
