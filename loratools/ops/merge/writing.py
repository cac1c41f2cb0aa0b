"""The files of a merge, written unit by unit, and what is measured on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loratools.execution import Runner
from loratools.ops.merge.outputs import CopyUnit, OutputFile, WorkUnit
from loratools.ops.merge.plan import MergePlan, specs, work_units
from loratools.ops.merge.provenance import inputs_record
from loratools.ops.merge.requantise import requantise, requantised_error_ratio
from loratools.ops.merge.rows import Gain, merge_rows
from loratools.ops.merge.stacks import copies, merge_stack, stacked_units
from loratools.ops.merge.verify import error_ratio
from loratools.storage.files import copy_range, identify, start_writeback
from loratools.storage.safetensors_writer import SafetensorsWriter
from loratools.tensors.files import ByteRange


@dataclass(frozen=True)
class Written:
    """What was measured on written rows: what became of the update, and the largest error as a share of the bound."""

    gain: Gain = field(default_factory=Gain)
    ratio: float = 0.0

    def __add__(self, other: Written) -> Written:
        return Written(self.gain + other.gain, max(self.ratio, other.ratio))


def write_weights(
    made: MergePlan, folder: Path, run_units: Runner, threads: int, verify: bool, progress: Callable[[int], None]
) -> tuple[dict[str, Written], dict[str, object]]:
    """Write every weight file to `folder`; what was measured, by tensor, and the record of the inputs."""
    units = work_units(made)
    left = Counter(u.file for u in units)
    written = {o.name: Written() for o in made.outputs}

    for file in made.files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as resources:
        # Files are flushed by a thread of their own, so that the disk works on one while the next is computed. It is
        # started when the first unit is done: workers are forked before there are threads.
        background = resources.enter_context(ThreadPoolExecutor(1, thread_name_prefix="loratools-flush"))
        writers = [resources.enter_context(_reserved(folder, file)) for file in made.files]
        finished: list[Future[None]] = []
        records: list[Future[dict[str, object]]] = []

        def work(stack: Sequence[WorkUnit]) -> list[Written]:
            file = stack[0].file
            return _write_stack(stack, made.files[file], writers[file], verify)

        def on_result(stack: Sequence[WorkUnit], _: list[Written]) -> None:
            if not records:
                records.append(background.submit(inputs_record, made))
            for unit in stack:
                name, (start, nbytes) = made.files[unit.file].stored_name(unit.output), _span(unit)
                writers[unit.file].account(name, start, nbytes)
                left[unit.file] -= 1
                if not left[unit.file]:
                    finished.append(background.submit(writers[unit.file].finish))
                progress(nbytes)

        # Added up in the order of the stacks, whatever the order in which they were done.
        stacks = stacked_units(units)
        results = run_units(stacks, work, threads=threads, on_result=on_result)
        for stack, measured in zip(stacks, results, strict=True):
            for unit, of_unit in zip(stack, measured, strict=True):
                written[unit.output.name] += of_unit
        for future in finished:
            future.result()
        return written, records[0].result() if records else inputs_record(made)


def _span(unit: WorkUnit) -> tuple[int, int]:
    """Where in its tensor the unit's bytes begin, and how many they are."""
    each = 1 if isinstance(unit, CopyUnit) else unit.output.row_bytes
    return unit.start * each, (unit.stop - unit.start) * each


def _write_stack(stack: Sequence[WorkUnit], file: OutputFile, writer: SafetensorsWriter, verify: bool) -> list[Written]:
    if len(stack) > 1:
        offsets = [writer.offset(file.stored_name(unit.output)) for unit in stack]
        with writer.opened() as fd:
            if isinstance(stack[0], CopyUnit):
                for source, target in copies(stack, offsets):
                    copy_range(source, fd, target, path=writer.path)
                return [Written()] * len(stack)
            measured = merge_stack([unit.output for unit in stack], offsets, fd, verify=verify)
        if measured is not None:
            return [Written(each.gain, each.ratio) for each in measured]
    return [_write_unit(unit, file, writer, verify) for unit in stack]


def _write_unit(unit: WorkUnit, file: OutputFile, writer: SafetensorsWriter, verify: bool) -> Written:
    offset, (start, nbytes) = writer.offset(file.stored_name(unit.output)), _span(unit)
    with writer.opened() as fd:
        if isinstance(unit, CopyUnit):
            piece = ByteRange(unit.source.file, unit.source.offset + start, nbytes)
            copy_range(piece, fd, offset + start, path=writer.path)
            return Written()
        packed = unit.output.requantised is not None
        gain = requantise(unit, fd, offset) if packed else merge_rows(unit, fd, offset)
        start_writeback(fd, offset + start, nbytes)
        measure = requantised_error_ratio if packed else error_ratio
        ratio = measure(unit, fd, offset) if verify and unit.output.touched else 0.0
    return Written(gain, ratio)


def _reserved(folder: Path, file: OutputFile) -> SafetensorsWriter:
    """A file of the result with its header and its size, open no longer than something is written to it."""
    writer = SafetensorsWriter(folder / file.name, specs(file), file.metadata)
    writer.release()
    return writer


def write_side_files(made: MergePlan, staging: Path, provenance: str) -> None:
    for file in made.side_files:
        path = staging / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.text is not None:
            path.write_text(file.text, encoding="utf-8")
        elif file.source is not None:
            found = identify(file.source)
            with path.open("xb") as opened:
                copy_range(ByteRange(found, 0, found.size), opened.fileno(), 0, path=path)
    (staging / "loratools.json").write_text(provenance, encoding="utf-8")
