"""What a run that can be resumed is to do, and which of the runs that were killed had the same to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from loratools.errors import ChangedInputError, MachineError, UsageError
from loratools.storage import system
from loratools.storage.files import machine_error, quoted
from loratools.storage.liveness import is_alive
from loratools.storage.run_journal import RecordedRun, read_journal
from loratools.storage.staging_names import process_space, staging_folders

_ANEW = "start without --resume; what the killed run left goes when the output is there, or with 'loratools clean'"


@dataclass(frozen=True)
class RunPlan:
    """All that the bytes of an output depend on, as texts that can be compared.

    Attributes:
        inputs: A digest of each input file, by what it is and its name.
        options: What a person chose, by the name of the option.
        program: Versions, by the name of the program or library.
    """

    inputs: Mapping[str, str]
    options: Mapping[str, str]
    program: Mapping[str, str]

    def to_dict(self) -> dict[str, Mapping[str, str]]:
        """The plan as the journal has it."""
        return asdict(self)


@dataclass(frozen=True)
class Resumable:
    """A run whose finished work can be kept for another one.

    Attributes:
        plan: What it is to do; None if that is noted in the journal later, before any unit is.
        resume: Whether to go on with a killed run of the same plan, which has to be given then.
    """

    plan: RunPlan | None
    resume: bool = False


@dataclass(frozen=True)
class AbandonedRun:
    """A hidden folder of a dead run with finished work in it.

    Attributes:
        path: The folder.
        recorded: What its journal says.
    """

    path: Path
    recorded: RecordedRun


def abandoned_runs(real: Path) -> list[AbandonedRun]:
    """What dead runs have left for an output that a run may go on with; those with most units first."""
    return [run for run, alive in _runs_of(real) if not alive and run.recorded.units]


def run_to_resume(out: Path, real: Path, plan: RunPlan) -> AbandonedRun | None:
    """The dead run of the same plan that got furthest; None if no killed run has left anything.

    Raises:
        ChangedInputError: The inputs are not those of the killed run.
        UsageError: Its options or programs are others.
        MachineError: Another run is writing the output.
    """
    runs = _runs_of(real)
    for run, alive in runs:
        head = run.recorded.head
        # A run of our own process for the same output is a part of this one (of one file: the file beside the work).
        if alive and (head.process, head.space) != (system.process_id(), process_space()):
            raise MachineError(
                f"{quoted(out)} is being written by another run (process {head.process} on {quoted(head.host)})",
                hint="wait until it is done, or end it",
            )
    planned = [run for run, _ in runs if run.recorded.plan is not None]
    same = [run for run in planned if run.recorded.plan == plan.to_dict()]
    if same or not planned:
        return same[0] if same else None
    raise _difference(out, planned[0].recorded, plan)


def _runs_of(real: Path) -> list[tuple[AbandonedRun, bool]]:
    """Runs for an output by their journals, and whether they are alive; those with most units first."""
    runs = []
    for folder in (*staging_folders(real), *staging_folders(real, inside=True)):
        try:
            recorded = read_journal(folder)
            if recorded is not None and recorded.head.output == real.name:
                runs.append((AbandonedRun(folder, recorded), is_alive(folder, recorded.head)))
        except OSError as error:
            raise machine_error(error, "look into", folder) from error
    return sorted(runs, key=lambda run: (-len(run[0].recorded.units), -run[0].recorded.head.started))


def _difference(out: Path, recorded: RecordedRun, plan: RunPlan) -> ChangedInputError | UsageError:
    """The error that says in what the plan of a killed run is another."""
    before = recorded.plan or {}
    inputs = _changes(before.get("inputs"), plan.inputs, with_values=False)
    others = [
        *_changes(before.get("options"), plan.options, with_values=True),
        *_changes(before.get("program"), plan.program, with_values=True),
    ]
    if inputs and not others:
        return ChangedInputError(
            f"the inputs are not those of the run for {quoted(out)} that was killed, which cannot be resumed",
            details=inputs,
            hint=f"bring the inputs back, or {_ANEW}",
        )
    return UsageError(
        f"the run for {quoted(out)} that was killed had something else to do, and cannot be resumed so",
        details=[*others, *inputs],
        hint=f"give the same options, or {_ANEW}",
    )


def _changes(before: object, now: Mapping[str, str], *, with_values: bool) -> list[str]:
    """A line for each member that differs."""
    recorded = before if isinstance(before, Mapping) else {}
    lines = []
    for name in sorted({*recorded, *now}):
        was, is_now = recorded.get(name), now.get(name)
        if was == is_now:
            continue
        if was is None:
            lines.append(f"{name}: {f'not given before, {is_now} now' if with_values else 'not there before'}")
        elif is_now is None:
            lines.append(f"{name}: {f'{was} before, not given now' if with_values else 'missing now'}")
        else:
            lines.append(f"{name}: {was} before, {is_now} now" if with_values else f"{name}: another content")
    return lines
