"""Merge weighted adapters into a checkpoint, file to file, in the memory of a few blocks.

    W' = round(W + sum of weight * dW)

The sum is formed in float32 (float64 for float64 weights) and rounded once, however many adapters there are.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, Size, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import InputError
from loratools.execution import Runner, runner
from loratools.execution.local import worker_count
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.opened_base import base_of
from loratools.ops.common.arguments import AdapterArgument, AdapterSource, RankFrom, load_weighted
from loratools.ops.common.same_invocation import refuse_invoked
from loratools.ops.merge.initial import with_initial
from loratools.ops.merge.one_file import as_one_file, is_one_file, recorded, staged_output
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outputs import CopyUnit, Output, OutputFile, Requantised, WorkUnit
from loratools.ops.merge.plan import MergePlan, index_texts, plan_merge, specs, work_units
from loratools.ops.merge.provenance import inputs_record, provenance_text
from loratools.ops.merge.requantise import requantise, requantised_error_ratio
from loratools.ops.merge.rounding import RoundingMode
from loratools.ops.merge.rows import Gain, merge_rows
from loratools.ops.merge.trained_on import declared_training, size_of_difference
from loratools.ops.merge.verify import error_ratio, require_right
from loratools.short_repr import few_lines, one_line
from loratools.storage.arrays import read_array
from loratools.storage.commit import check_output, require_files
from loratools.storage.files import copy_range, identify, start_writeback
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.safetensors_writer import SafetensorsWriter
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora_experts import Orientation, Packing

# Of an update on a coarser grid, less than this is told with its remedy.
_LOW_GAIN = 0.9
# Names in one warning.
_NAMED = 5
# Elements looked at in one go.
_LOOK = 1 << 18


@dataclass(frozen=True)
class MergedTensor:
    """What became of one weight in a merge.

    Attributes:
        name: The name of the weight.
        adapters: Positions of the adapters that changed it, from 0, in the order given.
        gain: `<merged - base, dW> / <dW, dW>`; None where it was replaced.
        max_error_ratio: The largest error in the rows that were checked, as a share of what is allowed; None where
            nothing was checked.
    """

    name: str
    adapters: tuple[int, ...]
    gain: float | None
    max_error_ratio: float | None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class RequantizedTensor:
    """A merged weight that is stored in the scheme of the base again.

    Attributes:
        name: The weight.
        scheme: Its scheme and the numbers in it: `bitsandbytes: nf4`.
        error_before: ||stored - sum|| / ||update|| if the sum were stored in the float dtype of the weight, as with
            `dequantize`; None where the update is zero.
        error_after: The same of what is stored.
        gain: How much of the update is in the result.
    """

    name: str
    scheme: str
    error_before: float | None
    error_after: float | None
    gain: float | None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class MergeReport:
    """The report of a merge.

    Of a plan `output` is None and nothing is measured. Shares and ratios are None where there was nothing to measure.

    `gain` and `unchanged_share` are measured on every block of 49,152 weights where a unit of work (32 MiB) has up to
    16 of them, and on every fourth where it has more. `max_error_ratio` is of nine rows in each unit.

    Attributes:
        output: Where the result was written; None where nothing was.
        adapters: Each adapter as it was named, and its weight.
        tensors: One entry per weight that was touched.
        merged_weights: How many weights were added to.
        untouched: How many weights were copied as they are, or only dequantised.
        replaced: How many weights were replaced.
        added: Names of weights that the base does not have.
        dequantized: Names of quantised weights that are written as floats.
        bytes: Size of the result in bytes.
        seconds: How long it took.
        gain: `<merged - base, dW> / <dW, dW>` over all touched weights.
        unchanged_share: The share of the touched weights whose stored value is that of the base.
        max_error_ratio: The largest error in the rows that were checked, as a share of what is allowed.
        verified: Whether rows were read back and checked.
        left_out: Names of the adapters that have no place in the base, with `allow_partial`.
        warnings: What a person should know about the result, as sentences.
        rounding: How sums were rounded to the dtype that they are stored in.
        requantized: One entry per weight that was quantised again.
        trained_on: How the base was quantised in training; None where that was not said.
        plan: What would be done; None where it was done.
    """

    output: Path | None
    adapters: tuple[tuple[str, float], ...]
    tensors: tuple[MergedTensor, ...]
    merged_weights: int
    untouched: int
    replaced: int
    added: tuple[str, ...]
    dequantized: tuple[str, ...]
    bytes: int
    seconds: float
    gain: float | None
    unchanged_share: float | None
    max_error_ratio: float | None
    verified: bool
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    rounding: RoundingMode = "nearest"
    requantized: tuple[RequantizedTensor, ...] = ()
    trained_on: str | None = None
    plan: MergePlan | None = None

    def __repr__(self) -> str:
        return few_lines(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per changed weight, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [
            {"name": t.name, "adapters": list(t.adapters), "gain": t.gain, "max_error_ratio": t.max_error_ratio}
            for t in self.tensors
        ]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools merge --json`, or of `--plan --json`, without its head."""
        if self.plan is not None:
            return self.plan.to_dict()
        return {
            "adapters": [{"path": path, "weight": weight} for path, weight in self.adapters],
            "targets": self.merged_weights,
            "untouched": self.untouched,
            "replaced": self.replaced,
            "added": list(self.added),
            "dequantized": list(self.dequantized),
            "requantized": [
                {
                    "name": t.name,
                    "scheme": t.scheme,
                    "error_before": t.error_before,
                    "error_after": t.error_after,
                    "gain": t.gain,
                }
                for t in self.requantized
            ],
            "rounding": self.rounding,
            "trained_on": self.trained_on,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gain": self.gain,
            "unchanged_share": self.unchanged_share,
            "max_error_ratio": self.max_error_ratio,
            "verified": self.verified,
            "tensors": self.rows(),
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
            "output": str(self.output),
        }


@checked
@holding_inputs()
def merge(
    base: str | Path | Checkpoint,
    adapters: Sequence[AdapterArgument] | AdapterSource,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: Size | None = None,
    dequantize: bool = False,
    requantize: bool = False,
    trained_on: str | Path | None = None,
    rounding: RoundingMode = "nearest",
    seed: int = 0,
    penalty: float | None = None,
    moments: str | Path | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    initial: Sequence[AdapterSource] = (),
    expert_packing: Packing | None = None,
    expert_orientation: Orientation | None = None,
    threads: Positive | None = None,
    execution: str = "local",
    progress: Callable[[int], None] | None = None,
    plan: bool = False,
) -> MergeReport:
    """Write `base` with the weighted sum of `adapters` added, as a checkpoint of the same layout.

    The sum is formed in float32 (float64 for float64 weights) and rounded once, however many adapters there are.
    Weights that no adapter touches keep their bytes. Nothing appears at `out` before all of it is there.

    Args:
        base: The model, by its path or opened.
        adapters: Paths, loaded adapters, or pairs of one of these and a weight (1 where none is given). The weight
            multiplies the delta.
        out: Where to write the merged model: a folder, or, for a base that is one file, a file whose name ends with
            .safetensors.
        dtype: The dtype that weights are stored in: float32, bfloat16, float16 or float64; the base's own where it is
            None.
        max_shard_size: Start a new weight file before one grows beyond this, in bytes or as "5GB"; the base's own files
            where it is None.
        dequantize: Write all quantised weights of the base as floats, in the dtype that its config names, and take the
            quantisation out of the config. Without it or `requantize`, a merge that would change one is refused.
        requantize: Store the quantised weights that the adapters change in the base's own scheme, with its scales and
            other parameters; all other weights keep their bytes.
        trained_on: The base is full precision, and the adapters were trained on it quantised by bitsandbytes: `nf4`,
            `fp4`, `int8`, or a JSON file with the `quantization_config` of the training. They are added to the values
            that training saw, which are those of the quantised weights.
        rounding: How sums that are stored in bfloat16 or float16 are rounded. `nearest`; `stochastic`: up or down at
            random, so that the expected value is the sum; `adapter`: up or down so that the outputs for the inputs that
            the adapters read change least; `calibrated`: the same for the inputs in `moments`.
        seed: Of `stochastic`: the same seed gives the same bytes.
        penalty: Of `adapter` and `calibrated`: what an error costs for all other inputs; larger is closer to `nearest`.
            0.25 and 0.01 where it is None.
        moments: Of `calibrated`: a safetensors file with the sum of x x' over the inputs x of each module, by the
            module's name, (inputs, inputs).
        allow_partial: Leave out, and report, what has no place in the base.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        verify: Read rows of every merged tensor back and compare them with float64 arithmetic.
        include: Globs over the names of modules and replaced weights of the adapters; all are taken where there is
            none.
        exclude: Globs of what is left out.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        from_format: The format of the adapters, where it is not to be found from the content.
        initial: For each adapter whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), the adapter as
            it was before training, in the same order: it is subtracted.
        expert_packing: `peft` or `expert-major`: how fused experts share the columns of B, where the files leave it
            open.
        expert_orientation: `out-in` or `in-out`: how square fused experts are stored, where the adapter does not tell.
        threads: Workers; one per CPU where it is None. The result does not depend on it.
        execution: `local` (threads of this process) or `forked` (processes: faster, for a program without other
            threads).
        progress: Called with the number of bytes just written, on the thread of the caller.
        plan: Work out from headers what would be done, and write nothing: `report.plan` has it all.

    Returns:
        A report: how many weights were merged, how much of the change survived rounding, and the largest error.

    Raises:
        UsageError: An invalid argument, or an input that does not exist.
        OutputExistsError: `out` exists, or is one of the inputs.
        InputError: An input is damaged, unsafe or not supported, or the inputs do not fit each other.
        MachineError: Disk full, no permission, or an input that changed meanwhile.

    Example:
        >>> import loratools
        >>> report = loratools.merge("fixtures/llama-tiny", [("fixtures/llama-tiny-science", 0.5)], "merged")
        >>> report.verified, report.merged_weights
        (True, 21)
    """
    options = MergeOptions(
        dtype=dtype,
        max_shard_size=max_shard_size,
        dequantize=dequantize,
        requantize=requantize,
        trained_on=trained_on,
        rounding=rounding,
        seed=seed,
        penalty=penalty,
        moments=moments,
        allow_partial=allow_partial,
        include=include,
        exclude=exclude,
        rank_from=rank_from,
        from_format=from_format,
        initial=initial,
        expert_packing=expert_packing,
        expert_orientation=expert_orientation,
    )
    made = plan_from_headers(base, adapters, out, options, overwrite=overwrite)
    if plan:
        return _planned(made)
    return run(made, out, overwrite=overwrite, verify=verify, threads=threads, execution=execution, progress=progress)


def plan_from_headers(
    base: str | Path | Checkpoint,
    adapters: Sequence[AdapterArgument] | AdapterSource,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    overwrite: bool = False,
) -> MergePlan:
    """Work out from headers what `merge` would do, writing nothing; arguments and errors as there."""
    out = Path(out)
    options = options if options is not None else MergeOptions()
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    one_file = is_one_file(out, checkpoint)
    loaded = load_for_merge(adapters, checkpoint, options)
    inputs = [checkpoint.path, *(a.path for a, _ in loaded if a.path is not None)]
    check_output(out, overwrite=overwrite, inputs=inputs)
    selected = [(a.selected(options.include, options.exclude), w) for a, w in loaded]
    made = plan_merge(checkpoint, selected, options, out=out)
    made = as_one_file(made) if one_file else made
    check_output(out, overwrite=overwrite, inputs=inputs, names=_names(made))
    for side_file in made.side_files:
        if side_file.source is not None:
            identify(side_file.source)  # held to what it is now, though it is copied last
    return made


def load_for_merge(
    adapters: Sequence[AdapterArgument] | AdapterSource, base: Checkpoint, options: MergeOptions
) -> list[tuple[Adapter, float]]:
    """The adapters with their weights, each less what it was before training where that is given."""
    loaded = load_weighted(
        adapters,
        rank_from=options.rank_from,
        from_format=options.from_format,
        moved=True,
        base=base_of(base),
        expert_packing=options.expert_packing,
        expert_orientation=options.expert_orientation,
        leave_out=LeaveOut.of(options.include, options.exclude, unread=options.allow_partial),
    )
    refuse_invoked([adapter for adapter, _ in loaded])
    return with_initial(loaded, options.initial, rank_from=options.rank_from, expert_packing=options.expert_packing)


def _planned(plan: MergePlan) -> MergeReport:
    touched = [o.merged for o in plan.outputs if o.touched]
    return MergeReport(
        output=None,
        adapters=tuple((a.name, w) for a, w in zip(plan.adapters, plan.weights, strict=True)),
        tensors=(),
        merged_weights=sum(1 for o in touched if o.updates),
        untouched=len(plan.outputs) - len(touched),
        replaced=sum(1 for o in touched if o.replaced_by is not None),
        added=plan.added,
        dequantized=plan.dequantized,
        bytes=plan.bytes_written,
        seconds=0.0,
        gain=None,
        unchanged_share=None,
        max_error_ratio=None,
        verified=False,
        left_out=tuple(left.name for left in plan.leftovers),
        warnings=plan.warnings,
        rounding=plan.rounding,
        trained_on=str(plan.trained_on) if plan.trained_on is not None else None,
        plan=plan,
    )


def _names(made: MergePlan) -> list[str]:
    """The files that will be in the output, without its record."""
    return [*(f.name for f in made.files), *(f.name for f in made.side_files), *index_texts(made)]


@holding_inputs()
def run(
    made: MergePlan,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    threads: Positive | None = None,
    execution: str = "local",
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Do what the plan says; with the arguments and errors of `merge`."""
    began = time.monotonic()
    out = Path(out)
    inputs = [made.base.path, *(a.path for a in made.adapters if a.path is not None)]
    check_output(out, overwrite=overwrite, inputs=inputs)
    made.require_space(out)
    _refuse_not_finite({a.name: {n: r.tensor for n, r in a.replacements.items()} for a, _ in made.active})
    run_units, workers = runner(execution), worker_count(threads)
    made = recorded(made) if made.one_file else made
    with staged_output(made, out, overwrite=overwrite, inputs=inputs) as staging:
        try:
            written, record = _write_weights(made, staging, run_units, workers, verify, progress or (lambda _: None))
        except InputError:
            # Where the adapters are to blame, all of their bad tensors are named, not the first weight that suffered.
            _refuse_not_finite({a.name: a.tensors() for a, _ in made.active})
            raise
        require_right({name: w.ratio for name, w in written.items()})
        report = _report(made, out, written, verify)
        if not made.one_file:
            _write_side_files(made, staging, provenance_text(record, report.to_dict()))
        # Last of all: whoever sees an index may rely on every shard that it names.
        for name, text in index_texts(made).items():
            (staging / name).write_text(text, encoding="utf-8")
        require_files(staging, out, _names(made))
    return replace(report, seconds=round(time.monotonic() - began, 3))


def _refuse_not_finite(tensors: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    """Raise InputError where values are not finite, naming every tensor by whose it is."""
    bad = [
        f"'{whose}'   {name}"
        for whose, named in tensors.items()
        for name, tensor in named.items()
        if tensor.dtype in FLOAT_DTYPES and not _is_finite(tensor)
    ]
    if bad:
        raise InputError(
            f"{len(bad)} tensors of the adapters hold values that are not finite",
            details=bad,
            hint="the training run diverged; take an earlier checkpoint, or leave these out with --exclude",
        )


def _is_finite(tensor: LazyTensor) -> bool:
    """Whether all values are, read in blocks of rows: a saved embedding may be larger than all else that is held."""
    import numpy as np

    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _LOOK // max(1, tensor.elements // max(1, rows)))
    return all(np.isfinite(read_array(tensor, "F32", i, min(i + step, rows))).all() for i in range(0, rows, step))


@dataclass(frozen=True)
class _Written:
    """What was measured on written rows: what became of the update, and the largest error as a share of the bound."""

    gain: Gain = field(default_factory=Gain)
    ratio: float = 0.0

    def __add__(self, other: _Written) -> _Written:
        return _Written(self.gain + other.gain, max(self.ratio, other.ratio))


def _write_weights(
    made: MergePlan, folder: Path, run_units: Runner, threads: int, verify: bool, progress: Callable[[int], None]
) -> tuple[dict[str, _Written], dict[str, object]]:
    """Write every weight file to `folder`; what was measured, by tensor, and the record of the inputs."""
    units = work_units(made)
    left = Counter(u.file for u in units)
    written = {o.name: _Written() for o in made.outputs}

    for file in made.files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # Files are flushed by a thread of their own, so that the disk works on one while the next is computed. It is
        # started when the first unit is done: workers are forked before there are threads.
        background = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="loratools-flush"))
        writers = [stack.enter_context(_reserved(folder, file)) for file in made.files]
        finished: list[Future[None]] = []
        records: list[Future[dict[str, object]]] = []

        def work(unit: WorkUnit) -> _Written:
            return _write_unit(unit, made.files[unit.file], writers[unit.file], verify)

        def on_result(unit: WorkUnit, _: _Written) -> None:
            if not records:
                records.append(background.submit(inputs_record, made))
            name, (start, nbytes) = made.files[unit.file].stored_name(unit.output), _span(unit)
            writers[unit.file].account(name, start, nbytes)
            left[unit.file] -= 1
            if not left[unit.file]:
                finished.append(background.submit(writers[unit.file].finish))
            progress(nbytes)

        # Added up in the order of the units, whatever the order in which they were done.
        for unit, measured in zip(units, run_units(units, work, threads=threads, on_result=on_result), strict=True):
            written[unit.output.name] += measured
        for future in finished:
            future.result()
        return written, records[0].result() if records else inputs_record(made)


def _span(unit: WorkUnit) -> tuple[int, int]:
    """Where in its tensor the unit's bytes begin, and how many they are."""
    each = 1 if isinstance(unit, CopyUnit) else unit.output.row_bytes
    return unit.start * each, (unit.stop - unit.start) * each


def _write_unit(unit: WorkUnit, file: OutputFile, writer: SafetensorsWriter, verify: bool) -> _Written:
    offset, (start, nbytes) = writer.offset(file.stored_name(unit.output)), _span(unit)
    with writer.opened() as fd:
        if isinstance(unit, CopyUnit):
            piece = ByteRange(unit.source.file, unit.source.offset + start, nbytes)
            copy_range(piece, fd, offset + start, path=writer.path)
            return _Written()
        packed = unit.output.requantised is not None
        gain = requantise(unit, fd, offset) if packed else merge_rows(unit, fd, offset)
        start_writeback(fd, offset + start, nbytes)
        measure = requantised_error_ratio if packed else error_ratio
        ratio = measure(unit, fd, offset) if verify and unit.output.touched else 0.0
    return _Written(gain, ratio)


def _reserved(folder: Path, file: OutputFile) -> SafetensorsWriter:
    """A file of the result with its header and its size, open no longer than something is written to it."""
    writer = SafetensorsWriter(folder / file.name, specs(file), file.metadata)
    writer.release()
    return writer


def _write_side_files(made: MergePlan, staging: Path, provenance: str) -> None:
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


def _report(made: MergePlan, out: Path, written: Mapping[str, _Written], verified: bool) -> MergeReport:
    written = {o.merged.name: written[o.name] for o in made.outputs}
    touched = [o.merged for o in made.outputs if o.touched]
    updated = [o for o in touched if o.updates]
    total = sum((written[o.name].gain for o in updated), Gain())
    on_grid = {r.output.name for r in made.requantized}
    plain = sum((written[o.name].gain for o in updated if o.name not in on_grid), Gain())
    tensors = []
    for o in touched:
        who = {u.adapter for u in o.updates} | ({o.replaced_by} if o.replaced_by is not None else set())
        measured = written[o.name]
        ratio = measured.ratio if verified else None
        tensors.append(MergedTensor(o.name, tuple(sorted(who)), measured.gain.gain if o.updates else None, ratio))
    warnings = list(made.warnings)
    if updated and total.energy == 0:
        warnings.append(
            f"every delta is zero, of {len(updated)} of {len(updated)} weights: the adapters are untrained, and the "
            "result equals the base"
        )
    elif updated and total.unchanged_share == 1 and not made.requantized:
        warnings.append(
            f"no weight that was measured changed, of {len(updated)} of {len(updated)}: all of the update is lost to "
            "rounding, being small against the spacing of the stored dtype, and the result equals the base; "
            "--rounding adapter keeps some of it, and --dtype float32 all"
        )
    elif plain.gain is not None and plain.gain < 0.99:
        keeps_more = "" if any(o.rounding.feeds_back for o in updated) else "--rounding adapter keeps more of it, and "
        warnings.append(
            f"{1 - plain.gain:.1%} of the update is lost to rounding, being small against the spacing of the stored "
            f"dtype; {keeps_more}--dtype float32 keeps it"
        )
    requantized = tuple(_requantized(r, written[r.output.name].gain) for r in made.requantized)
    packed = sum((written[t.name].gain for t in requantized), Gain())
    if packed.gain is not None and packed.gain < _LOW_GAIN:
        keeps_more = "" if any(o.rounding.feeds_back for o in updated) else "--rounding adapter keeps more of it, and "
        warnings.append(
            f"{1 - packed.gain:.1%} of the update is lost in {len(requantized)} weights that are quantised again, "
            f"being small against the steps of their grid; {keeps_more}--dequantize keeps it"
        )
    warnings += _training_warnings(made, updated)
    undirected = [o.name for o in updated if written[o.name].gain.undirected]
    if undirected:
        warnings.append(
            f"{len(undirected)} merged weights are rounded to nearest, since their updates have no factors that tell "
            f"which inputs they read: {', '.join(undirected[:_NAMED])}{', ...' if len(undirected) > _NAMED else ''}"
        )
    return MergeReport(
        output=out,
        adapters=tuple((a.name, w) for a, w in zip(made.adapters, made.weights, strict=True)),
        tensors=tuple(tensors),
        merged_weights=len(updated),
        untouched=len(made.outputs) - len(touched),
        replaced=len([o for o in touched if o.replaced_by is not None and o.name not in made.added]),
        added=made.added,
        dequantized=made.dequantized,
        bytes=made.bytes_written,
        seconds=0.0,
        gain=total.gain,
        unchanged_share=total.unchanged_share,
        max_error_ratio=max((t.max_error_ratio or 0.0 for t in tensors), default=None) if verified else None,
        verified=verified,
        left_out=tuple(left.name for left in made.leftovers),
        warnings=tuple(warnings),
        rounding=made.rounding,
        trained_on=str(made.trained_on) if made.trained_on is not None else None,
        requantized=requantized,
    )


def _training_warnings(made: MergePlan, updated: Sequence[Output]) -> list[str]:
    """How far the values that training saw are from the base's, where they are taken, or where they should be."""
    if made.trained_on is not None:
        size = size_of_difference(updated, made.trained_on)
        base = f"the base as {made.trained_on} makes it"
        return [f"added to {base}, which differs from the base by {size:.2g} times the update"] if size else []
    if made.base.quantisation is not None or made.dequantized:
        return []
    warnings = []
    for i, (adapter, weight) in enumerate(zip(made.adapters, made.weights, strict=True)):
        scheme = declared_training(adapter) if weight else None
        if scheme is None:
            continue
        size = size_of_difference([o for o in updated if any(u.adapter == i for u in o.updates)], scheme)
        beside = f", from which the base differs by {size:.2g} times the update" if size is not None else ""
        warnings.append(
            f"'{adapter.name}' was trained on this model quantised ({scheme}){beside}; --trained-on "
            f"{scheme.codes if not scheme.nested else 'FILE'} merges into the values that training saw"
        )
    return warnings


def _requantized(requantised: Requantised, gain: Gain) -> RequantizedTensor:
    def share(square: float) -> float | None:
        return math.sqrt(square / gain.energy) if gain.energy > 0 else None

    return RequantizedTensor(
        requantised.output.name, requantised.scheme, share(gain.float_error), share(gain.stored_error), gain.gain
    )
