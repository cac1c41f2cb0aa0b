"""Modules that are combined or resized as units of work: set aside when they are done, and taken up by another run.

An update that is one of the inputs' own is set aside by its position among them, and no byte of it is copied. A unit of
another kind of processor has another name, since the last bits of its values are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from loratools.ops.common.device import computed_on
from loratools.storage.scratch import FinishedUnit, WorkStore
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.updates.full import Full
from loratools.updates.lora import LoRA
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

# What combining and resizing make; any other kind comes from an input.
_RESULTS: Mapping[str, type[LoRA | Full]] = {LoRA.kind: LoRA, Full.kind: Full}


@dataclass(frozen=True)
class FinishedModule:
    """A module that is done.

    Attributes:
        updates: What was computed of it, by the names that it was set aside under.
        facts: What was measured on it.
    """

    updates: Mapping[str, Update]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class FinishedModules:
    """The modules of a run that are done, by name.

    Attributes:
        store: Where they are set aside.
        computed_on: The kind of processor.
    """

    store: WorkStore
    computed_on: str = field(default_factory=computed_on)

    def finished(self, name: str, inputs: Sequence[Update]) -> FinishedModule | None:
        """What a killed run has done of a module; None where it must be done.

        Args:
            name: The module.
            inputs: The updates that it is made of, in the order in which they are given to `keep`.
        """
        unit = self.store.finished(self._unit(name))
        if unit is None:
            return None
        try:
            noted: Mapping[str, Any] = unit.facts["updates"]
            updates = {label: _restored(label, entry, unit, inputs) for label, entry in noted.items()}
            return FinishedModule(updates, dict(unit.facts["facts"]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None  # not as it is written here

    def keep(
        self, name: str, inputs: Sequence[Update], updates: Mapping[str, Update], facts: Mapping[str, object]
    ) -> None:
        """Set a module aside.

        Args:
            name: The module.
            inputs: The updates that it is made of.
            updates: What was computed of it.
            facts: What was measured on it, as JSON has it.

        Raises:
            MachineError: The disk is full, or there is no permission.
        """
        if not self.store.outlives_run:
            return
        entries: dict[str, object] = {}
        values: dict[str, LazyTensor] = {}
        for label, update in updates.items():
            entries[label], tensors = _entry(update, inputs)
            values |= {f"{label}.{field_name}": tensor for field_name, tensor in tensors.items()}
        read = {key: tensor.read() for key, tensor in values.items()}
        self.store.keep(self._unit(name), read, {"updates": entries, "facts": facts})

    def singular_values(self, name: str) -> tuple[Tensor, int] | None:
        """The singular values of a module that a killed run has computed, and the sum of the sizes of its matrix."""
        unit = self.store.finished(self._unit(f"singular values of {name}"))
        if unit is None:
            return None
        try:
            return unit.tensors["s"].read(), int(unit.facts["sizes"])
        except (KeyError, TypeError, ValueError):
            return None  # not as it is written here

    def keep_singular_values(self, name: str, s: Tensor, sizes: int) -> None:
        """Set the singular values of a module aside, with the sum of the sizes of its matrix; raises MachineError."""
        if self.store.outlives_run:
            self.store.keep(self._unit(f"singular values of {name}"), {"s": s}, {"sizes": sizes})

    def _unit(self, name: str) -> str:
        return f"{name}, {self.computed_on}"


def _entry(update: Update, inputs: Sequence[Update]) -> tuple[dict[str, object], Mapping[str, LazyTensor]]:
    """How an update is noted, and those of its tensors that have to be set aside."""
    for position, original in enumerate(inputs):
        if update is original or update == original:
            return {"input": position}, {}
    tensors, numbers = _fields_of(update)
    for position, original in enumerate(inputs):
        # One whose tensors were rounded to another dtype, and which is of any kind.
        if type(original) is type(update) and _fields_of(original)[1] == numbers:
            return {"input": position, "tensors": [*tensors]}, tensors
    return {"kind": update.kind, "numbers": numbers, "tensors": [*tensors]}, tensors


def _fields_of(update: Update) -> tuple[dict[str, LazyTensor], dict[str, object]]:
    """The tensors of an update, and what it has beside them, by field."""
    values = {each.name: getattr(update, each.name) for each in fields(update)}  # type: ignore[arg-type]
    tensors = {name: value for name, value in values.items() if isinstance(value, LazyTensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def _restored(label: str, entry: Mapping[str, Any], unit: FinishedUnit, inputs: Sequence[Update]) -> Update:
    """The update that an entry is about; its values are in memory, since the folder goes with the run."""
    tensors = {name: from_torch(unit.tensors[f"{label}.{name}"].read()) for name in entry.get("tensors", ())}
    if "input" in entry:
        original = inputs[entry["input"]]
        rounded: Update = replace(original, **tensors) if tensors else original  # type: ignore[type-var, unused-ignore]
        return rounded
    values: dict[str, Any] = {**tensors, **entry["numbers"]}
    return _RESULTS[entry["kind"]](**values)
