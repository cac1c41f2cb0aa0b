"""What a merge writes down while it runs, so that another one can go on with it when it is killed.

A unit of merged rows is noted with a checksum of its bytes and what was measured on it. A run that goes on reads each
of them back and does again what is not as it was noted. Copied bytes are not noted: to compare them with the base would
take as long as to copy them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from loratools.ops.common.run_plans import digest_of_values, program_versions, spelled_options
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.rows import Gain
from loratools.storage.files import fingerprint, identify
from loratools.storage.resumption import RunPlan
from loratools.storage.run_journal import RunJournal


@dataclass(frozen=True)
class Written:
    """What was measured on written rows: what became of the update, and the largest error as a share of the bound."""

    gain: Gain = field(default_factory=Gain)
    ratio: float = 0.0

    def __add__(self, other: Written) -> Written:
        return Written(self.gain + other.gain, max(self.ratio, other.ratio))


@dataclass(frozen=True)
class DoneStack:
    """Units that are done, together: one, or a stack of small ones.

    Attributes:
        written: What was measured on each.
        checksum: Of the bytes that were written, one unit after the other; None of copies.
        resumed: Whether a killed run had done them.
    """

    written: tuple[Written, ...]
    checksum: str | None = None
    resumed: bool = False

    def is_of(self, units: int) -> bool:
        """Whether it has entries for this number of units."""
        return len(self.written) == units

    def to_list(self) -> list[object]:
        """What the journal says of it."""
        return [self.checksum, [[written.ratio, *astuple(written.gain)] for written in self.written]]

    @classmethod
    def of(cls, noted: object) -> DoneStack | None:
        """What a line of a journal is about; None if the line is not as we write it."""
        match noted:
            case [str(checksum), list(units)] if units:
                measured = tuple(written for unit in units if (written := _measured(unit)) is not None)
                return cls(measured, checksum, resumed=True) if len(measured) == len(units) else None
        return None


def _measured(unit: object) -> Written | None:
    """What a line says was measured on a unit: its ratio, and what became of the update."""
    if not isinstance(unit, list) or len(unit) != 1 + len(fields(Gain)):
        return None
    if not all(isinstance(value, int | float) for value in unit):
        return None
    ratio, *gain = unit
    return Written(Gain(*gain), ratio)


class MergeJournal:
    """The journal of a merge: stacks of units by their number. What is done before the plan is noted waits for it."""

    def __init__(self, journal: RunJournal | None, *, has_plan: bool) -> None:
        self._journal = journal
        self._has_plan = has_plan
        self._waiting: list[tuple[int, DoneStack]] = []
        self.resumed: dict[int, DoneStack] = {}
        for number, noted in (journal.units if journal is not None else {}).items():
            if number.isdecimal() and (stack := DoneStack.of(noted)) is not None:
                self.resumed[int(number)] = stack

    @property
    def has_plan(self) -> bool:
        """Whether it is written down what is merged with what."""
        return self._has_plan

    def note_plan(self, plan: RunPlan) -> None:
        """Write down what is merged with what, and the units that waited for it; raises MachineError."""
        if self._journal is not None:
            self._journal.note_plan(plan.to_dict())
        self._has_plan = True
        waiting, self._waiting = self._waiting, []
        for number, stack in waiting:
            self.note(number, stack)

    def note(self, number: int, stack: DoneStack) -> None:
        """Write down that units are done, unless they were so already; raises MachineError."""
        if self._journal is None or stack.checksum is None or stack.resumed:
            return
        if self._has_plan:
            self._journal.note(str(number), stack.to_list())
        else:
            self._waiting.append((number, stack))


def run_plan(plan: MergePlan, record: Mapping[str, Any], *, verify: bool, manifest: bool) -> RunPlan:
    """All that the bytes of the result depend on.

    Args:
        plan: The plan of the merge.
        record: Its inputs with their digests (`provenance.inputs_record`).
        verify: Whether the result is read back, which its record says.
        manifest: Whether all files are hashed, which its record says too.
    """
    inputs = {f"{file['name']} of the base": str(file["fingerprint"]) for file in record["base"]["files"]}
    options = {"verb": "merge"} | _options(plan.options)
    for number, (adapter, entry) in enumerate(zip(plan.adapters, record["adapters"], strict=True), 1):
        called = f"adapter {number} ({adapter.name})"
        inputs |= {f"{file['name']} of {called}": str(file["sha256"]) for file in entry["files"]}
        if (digest := digest_of_values(adapter)) is not None:
            inputs[f"values of {called}"] = digest
        options[f"weight of {called}"] = repr(entry["weight"])
    for side_file in plan.side_files:
        if side_file.source is not None:
            inputs[f"{side_file.name} of {side_file.origin}"] = fingerprint(identify(side_file.source))
        elif side_file.text:  # a model card has none before everything is measured
            inputs[f"{side_file.name}, as it is written"] = sha256(side_file.text.encode()).hexdigest()
    for option in ("moments", "trained_on"):
        path = getattr(plan.options, option)
        if path is not None and Path(path).is_file():
            inputs[f"file of --{option.replace('_', '-')}"] = fingerprint(identify(Path(path)))
    options |= {"--no-verify": str(not verify), "--manifest": str(manifest)}
    return RunPlan(inputs, options, program_versions())


def _options(options: MergeOptions) -> dict[str, str]:
    """Every option that has a value; those of size and dtype by what they mean."""
    values: dict[str, object] = {f.name: getattr(options, f.name) for f in fields(options)}
    values |= {"dtype": options.stored_dtype, "max_shard_size": options.max_shard_bytes}
    del values["initial"]  # they are among the adapters
    return spelled_options(values)
