"""The files of a merge, written unit by unit, and what is measured on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.execution import Runner
from loratools.ops.merge.journal import DoneStack, MergeJournal, Written, run_plan
from loratools.ops.merge.outputs import CopyUnit, OutputFile, RowsUnit, WorkUnit
from loratools.ops.merge.plan import MergePlan, work_units
from loratools.ops.merge.provenance import inputs_record
from loratools.ops.merge.requantise import requantise, requantised_error_ratio
from loratools.ops.merge.rows import merge_rows
from loratools.ops.merge.stacks import merge_stack, stacked_units
from loratools.ops.merge.verify import error_ratio
from loratools.storage.checksum import Checksum
from loratools.storage.files import copy_file, copy_range, identify, sha256, start_writeback
from loratools.storage.json_file import write_new
from loratools.storage.ownership import RECORD
from loratools.storage.staging import Staging
from loratools.storage.streamed_file import FileLayout, StreamedFile
from loratools.tensors.files import ByteRange


def write_weights(
    plan: MergePlan,
    prepared: Staging,
    run_units: Runner,
    threads: int,
    *,
    verify: bool,
    manifest: bool,
    progress: Callable[[int], None],
    record: Mapping[str, Any] | None = None,
) -> WrittenWeights:
    """Write every weight file, or what of it a killed run had not written.

    Args:
        plan: The plan.
        prepared: Where to write, with the journal of the run.
        run_units: Runs the units.
        threads: Workers.
        verify: Whether rows are read back and checked.
        manifest: Whether files are hashed when they are finished.
        progress: Called with the number of bytes written since the last call.
        record: The inputs with their digests, where they are known already, and the plan is in the journal.
    """
    folder = prepared.path
    units = work_units(plan)
    pending_units = Counter(u.file for u in units)
    nothing = Written()
    written = dict.fromkeys([o.name for o in plan.outputs], nothing)
    stacks = stacked_units(units)
    journal = MergeJournal(prepared.journal, has_plan=record is not None)
    if prepared.resumed:
        prepared.keep_only(file.name for file in plan.files)
    for file in plan.files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as resources:
        # Files are flushed by a thread of their own, so that the disk works on one while the next is computed. It is
        # started when the first unit is done: workers are forked before there are threads.
        background = resources.enter_context(ThreadPoolExecutor(1, thread_name_prefix="loratools-flush"))
        writers = [
            _reserved(folder, file, layout, resources, keep=prepared.resumed)
            for file, layout in zip(plan.files, plan.layouts, strict=True)
        ]
        finished: list[Future[None]] = []
        records: list[Future[Mapping[str, Any]]] = []

        def work(number: int) -> DoneStack:
            stack = stacks[number]
            file = stack[0].file
            return _write_stack(stack, plan.files[file], writers[file], verify, journal.resumed.get(number))

        def finish(file: int) -> None:
            writers[file].finish()
            if manifest:
                prepared.sha256_of[plan.files[file].name] = sha256(writers[file].path)

        def on_result(number: int, stack: DoneStack) -> None:
            if not records and record is None:
                records.append(background.submit(inputs_record, plan))
            if not journal.has_plan and records[0].done():
                journal.note_plan(run_plan(plan, records[0].result(), verify=verify, manifest=manifest))
            written_bytes = 0
            for unit in stacks[number]:
                offset, nbytes = _span(unit, plan.files[unit.file], writers[unit.file])
                written_bytes += nbytes
                writers[unit.file].account_range(offset, nbytes)
                pending_units[unit.file] -= 1
                if not pending_units[unit.file]:
                    finished.append(background.submit(finish, unit.file))
            journal.note(number, stack)
            progress(written_bytes)

        # Added up in the order of the stacks, whatever the order in which they were done.
        results = run_units(range(len(stacks)), work, threads=threads, on_result=on_result)
        for stack, result in zip(stacks, results, strict=True):
            for unit, of_unit in zip(stack, result.written, strict=True):
                # Most weights of a large model are copied: there is nothing to add.
                if not isinstance(unit, CopyUnit):
                    written[unit.output.name] += of_unit
        for future in finished:
            future.result()
        inputs = record or (records[0].result() if records else inputs_record(plan))
        computed = [
            (stack, result) for stack, result in zip(stacks, results, strict=True) if result.checksum is not None
        ]
        resumed_units = sum(len(stack) for stack, result in computed if result.resumed)
        return WrittenWeights(written, inputs, resumed_units, sum(len(stack) for stack, _ in computed))


@dataclass(frozen=True)
class WrittenWeights:
    """What came of writing the weight files.

    Attributes:
        measured: What was measured, by tensor.
        inputs: The record of the inputs.
        resumed_units: How many units of merged rows a killed run had done.
        units: How many there are.
    """

    measured: Mapping[str, Written]
    inputs: Mapping[str, Any]
    resumed_units: int
    units: int


def _span(unit: WorkUnit, file: OutputFile, writer: StreamedFile) -> tuple[int, int]:
    """Where in its file the unit's bytes begin, and how many they are."""
    if isinstance(unit, CopyUnit):
        return unit.target, unit.source.nbytes
    start, nbytes = _rows_span(unit)
    return writer.offset(file.stored_name(unit.output)) + start, nbytes


def _rows_span(unit: RowsUnit) -> tuple[int, int]:
    """Where in its tensor the unit's bytes begin, and how many they are."""
    return unit.start * unit.output.row_bytes, (unit.stop - unit.start) * unit.output.row_bytes


def _write_stack(
    stack: Sequence[WorkUnit], file: OutputFile, writer: StreamedFile, verify: bool, noted: DoneStack | None
) -> DoneStack:
    """Write some units together, or one alone; `noted`: what the journal of a killed run says of them."""
    with writer.opened() as fd:
        for unit in stack:
            if isinstance(unit, CopyUnit):
                copy_range(unit.source, fd, unit.target, path=writer.path)
        computed = [unit for unit in stack if isinstance(unit, RowsUnit)]
        if not computed:
            return DoneStack((Written(),) * len(stack))
        offsets = [writer.offset(file.stored_name(unit.output)) for unit in computed]
        if noted is not None and noted.is_of(len(computed)) and noted.checksum == _checksum(computed, offsets, fd):
            return noted
        checksum = Checksum()
        if len(computed) > 1:
            measured = merge_stack([unit.output for unit in computed], offsets, fd, verify=verify, checksum=checksum)
            if measured is not None:
                return DoneStack(tuple(Written(each.gain, each.ratio) for each in measured), checksum.hexdigest())
        written = [
            _write_rows(unit, fd, offset, verify, checksum) for unit, offset in zip(computed, offsets, strict=True)
        ]
    return DoneStack(tuple(written), checksum.hexdigest())


def _write_rows(unit: RowsUnit, fd: int, offset: int, verify: bool, checksum: Checksum) -> Written:
    start, nbytes = _rows_span(unit)
    packed = unit.output.requantised is not None
    gain = (requantise if packed else merge_rows)(unit, fd, offset, checksum)
    start_writeback(fd, offset + start, nbytes)
    measure = requantised_error_ratio if packed else error_ratio
    return Written(gain, measure(unit, fd, offset) if verify and unit.output.touched else 0.0)


def _checksum(units: Sequence[RowsUnit], offsets: Sequence[int], fd: int) -> str:
    """Of bytes that a killed run wrote."""
    checksum = Checksum()
    for unit, offset in zip(units, offsets, strict=True):
        start, nbytes = _rows_span(unit)
        checksum.add_written(fd, offset + start, nbytes)
    return checksum.hexdigest()


def _reserved(folder: Path, file: OutputFile, layout: FileLayout, resources: ExitStack, *, keep: bool) -> StreamedFile:
    """A file of the result with its header and its size, open no longer than something is written to it.

    When `resources` unwind it is closed and stays: whether it is of use to another run is for its folder to say.
    """
    sizes = {name: output.nbytes for name, output in zip(file.stored_names, file.outputs, strict=True)}
    writer = StreamedFile(folder / file.name, layout, sizes, keep=keep)
    resources.callback(writer.close)
    writer.release()
    return writer


def write_side_files(plan: MergePlan, staging: Path, provenance: str) -> None:
    for file in plan.side_files:
        path = staging / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.text is not None:
            write_new(path, file.text.encode())
        elif file.source is not None:
            source = identify(file.source)
            copy_file(ByteRange(source, 0, source.size), path)
    write_new(staging / RECORD, provenance.encode())
