"""merge: add weighted adapters to a checkpoint, file to file, in the memory of a few blocks.

    W' = round(W + sum of weight * dW)

The sum is formed in float32 (float64 for float64 weights) and rounded once, however many adapters there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, Size, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import InputError, UsageError
from loratools.execution import runner
from loratools.execution.local import worker_count
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.opened_base import base_of
from loratools.ops.common.abandoned import abandoned_warnings, resumed_remarks
from loratools.ops.common.arguments import AdapterArgument, AdapterSource, RankFrom, Reading, load_weighted
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.finite import refuse_not_finite
from loratools.ops.common.same_invocation import refuse_invoked
from loratools.ops.merge.card import card_written, with_card
from loratools.ops.merge.initial import with_initial
from loratools.ops.merge.journal import run_plan
from loratools.ops.merge.one_file import as_one_file, is_one_file, recorded, staged_output
from loratools.ops.merge.options import GgmlType, MergeOptions
from loratools.ops.merge.outcome import measured_report, planned_report
from loratools.ops.merge.plan import MergePlan, index_names, index_texts, plan_merge
from loratools.ops.merge.provenance import inputs_record, provenance_text
from loratools.ops.merge.report import MergeReport
from loratools.ops.merge.rounding import RoundingMode
from loratools.ops.merge.verify import require_right
from loratools.ops.merge.writing import write_side_files, write_weights
from loratools.storage.commit import check_output
from loratools.storage.files import identify
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.json_file import write_new
from loratools.storage.resumption import Resumable
from loratools.updates.lora_experts import Orientation, Packing


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
    requantize: bool | GgmlType = False,
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
    resume: bool = False,
    manifest: bool = False,
    card: bool = True,
) -> MergeReport:
    """Write `base` with the weighted sum of `adapters` added, as a checkpoint of the same layout.

    The sum is formed in float32 (float64 for float64 weights) and rounded once, however many adapters there are.
    Weights that no adapter changes keep their bytes. `out` appears only when it is complete.

    Args:
        base: The base model: a path or an opened checkpoint.
        adapters: Paths, loaded adapters, or pairs of one of these and a weight (1 if none is given). The weight
            multiplies the delta.
        out: Where to write the merged model. A folder; or a file ending in `.safetensors` if the base is one file, or
            in `.gguf` if the base is GGUF.
        dtype: The dtype of the stored weights: float32, bfloat16, float16 or float64; the base's dtype if None.
        max_shard_size: The largest size of a weight file, in bytes or as "5GB"; if None, the files of the base are
            kept.
        dequantize: Write all quantised weights of the base as floats, in the dtype that its config names, and remove
            the quantisation from the config. For a GGUF base, only the changed weights are written as floats, in
            float16 if `dtype` is None. If neither this nor `requantize` is set, a merge that changes quantised weights
            is refused.
        requantize: Store changed quantised weights in the scheme of the base, with its scales and other parameters; all
            other weights keep their bytes. For a GGUF base, a type may be named instead of True: `q8_0`, `q5_1`,
            `q5_0`, `q4_1` or `q4_0`. Changed weights are then stored in that type, with new scales.
        trained_on: How training quantised the base, if the adapters were trained on a quantised copy of this
            full-precision base (QLoRA): `nf4`, `fp4`, `int8`, or a JSON file with the `quantization_config` of the
            training. The adapters are then added to the dequantised values that training saw.
        rounding: How sums stored in bfloat16 or float16 are rounded. `nearest`. `stochastic`: up or down at random, so
            that the expected value is the sum. `adapter`: up or down such that the outputs change least for the inputs
            that the adapters react to. `calibrated`: the same for the inputs in `moments`.
        seed: Random seed of `stochastic` rounding. Equal seeds give equal bytes.
        penalty: With `adapter` and `calibrated` rounding: how much rounding errors on all other inputs count; larger
            values are closer to `nearest`. If None: 0.25 and 0.01; 0.1 and 0.01 for requantised weights.
        moments: With `calibrated` rounding: a safetensors file with the sum of x x' over the inputs x of each module,
            (in, in), under the module's name.
        allow_partial: Leave out what does not fit the base, and list it in the report.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        verify: Read rows of every merged tensor back and compare them with float64 arithmetic.
        include: Globs over the names of modules and replaced weights of the adapters; empty selects all.
        exclude: Globs of names to leave out.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        from_format: The format of the adapters; detected from the content if None.
        initial: For each adapter whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), the adapter as
            it was before training, in the same order. It is subtracted.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        expert_orientation: `out-in` or `in-out`: the orientation of square fused experts, if the files do not say.
        threads: Number of workers; one per CPU if None. The result does not depend on it.
        execution: `local` uses threads of this process. `forked` uses processes: it is faster, and the calling program
            must have no other threads.
        progress: Called in the thread of the caller, with the number of bytes written since the last call.
        plan: Compute the plan from headers, and write nothing. The plan is in `report.plan`.
        resume: Continue a killed run of the same plan. The result has the same bytes as an uninterrupted run. If
            inputs, options or versions differ, the call is refused. If no run was killed, the merge starts from the
            beginning.
        manifest: Record the hash of every file of the result, including weight files, for `verify_files`.
        card: Write a model card (`README.md`) into an output folder, in place of a copy of the base's card.

    Returns:
        A report: how many weights were merged, how much of the change survived rounding, and the largest error.

    Raises:
        UsageError: An argument is invalid, or an input does not exist.
        OutputExistsError: `out` exists and may not be replaced, or is one of the inputs.
        InputError: An input is damaged, unsafe or not supported, or the inputs do not fit together.
        MachineError: The disk is full, permission is missing, or an input changed during the run.

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
    merge_plan = plan_from_headers(base, adapters, out, options, overwrite=overwrite, card=card)
    if plan:
        return planned_report(merge_plan)
    return run(
        merge_plan,
        out,
        overwrite=overwrite,
        verify=verify,
        threads=threads,
        execution=execution,
        progress=progress,
        resume=resume,
        manifest=manifest,
    )


def plan_from_headers(
    base: str | Path | Checkpoint,
    adapters: Sequence[AdapterArgument] | AdapterSource,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    overwrite: bool = False,
    card: bool = True,
) -> MergePlan:
    """Compute the plan of `merge` from headers, with the same arguments and errors, and write nothing."""
    out = Path(out)
    options = options if options is not None else MergeOptions()
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    one_file = is_one_file(out, checkpoint)
    loaded = load_for_merge(adapters, checkpoint, options)
    inputs = [checkpoint.path, *(a.path for a, _ in loaded if a.path is not None)]
    selected = [(a.selected(options.include, options.exclude), w) for a, w in loaded]
    merge_plan = plan_merge(checkpoint, selected, options, out=out)
    merge_plan = as_one_file(merge_plan) if one_file else merge_plan
    merge_plan = with_card(merge_plan, out) if card else merge_plan
    # Checked here, once the names of the new files are known. `staged_output` checks again before it begins, since
    # another program may have written there meanwhile.
    check_output(out, overwrite=overwrite, inputs=inputs, names=_names(merge_plan))
    for side_file in merge_plan.side_files:
        if side_file.source is not None:
            identify(side_file.source)  # checked against its state now, although it is copied last
    return merge_plan


def load_for_merge(
    adapters: Sequence[AdapterArgument] | AdapterSource, base: Checkpoint, options: MergeOptions
) -> list[tuple[Adapter, float]]:
    """The adapters with their weights, and the initial adapters with the opposite weights."""
    reading = Reading(
        rank_from=options.rank_from,
        from_format=options.from_format,
        moved=True,
        base=base_of(base),
        expert_packing=options.expert_packing,
        expert_orientation=options.expert_orientation,
        leave_out=LeaveOut.of(options.include, options.exclude, unread=options.allow_partial),
    )
    loaded = load_weighted(adapters, reading)
    refuse_invoked([adapter for adapter, _ in loaded])
    return with_initial(loaded, options.initial, rank_from=options.rank_from, expert_packing=options.expert_packing)


def _names(merge_plan: MergePlan) -> list[str]:
    """The files of the output, without its record."""
    return [*(f.name for f in merge_plan.files), *(f.name for f in merge_plan.side_files), *index_names(merge_plan)]


@holding_inputs()
def run(
    merge_plan: MergePlan,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    threads: Positive | None = None,
    execution: str = "local",
    progress: Callable[[int], None] | None = None,
    resume: bool = False,
    manifest: bool = False,
) -> MergeReport:
    """Carry out the plan, with the arguments and errors of `merge`."""
    began = time.monotonic()
    out = Path(out)
    inputs = [merge_plan.base.path, *(a.path for a in merge_plan.adapters if a.path is not None)]
    if not resume:  # what a killed run reserved is its own
        merge_plan.require_space(out)
    fetch_values(merge_plan.base, *(adapter for adapter, _ in merge_plan.active))
    refuse_not_finite({a.name: {n: r.tensor for n, r in a.replacements.items()} for a, _ in merge_plan.active})
    run_units, workers = runner(execution), worker_count(threads)
    if manifest and merge_plan.one_file:
        raise UsageError(
            "one file has no record beside it for the hash of its content",
            hint="leave out --manifest, or write a folder",
        )
    merge_plan = recorded(merge_plan) if merge_plan.one_file else merge_plan
    # Adapters are hashed in full; a run that resumes nothing does that in parallel with its work.
    record = inputs_record(merge_plan) if resume else None
    run_to_resume = run_plan(merge_plan, record, verify=verify, manifest=manifest) if record is not None else None
    remarks = [] if resume else abandoned_warnings(out)
    resumable = Resumable(run_to_resume, resume)
    with staged_output(merge_plan, out, overwrite=overwrite, inputs=inputs, resumable=resumable) as prepared:
        staging = prepared.path
        if not manifest:
            prepared.sampled = frozenset(file.name for file in merge_plan.files)
        try:
            weights = write_weights(
                merge_plan,
                prepared,
                run_units,
                workers,
                verify=verify,
                manifest=manifest,
                progress=progress or (lambda _: None),
                record=record,
            )
        except InputError:
            # If the adapters have bad values, all of their bad tensors are named, not the first weight that they reach.
            refuse_not_finite({a.name: a.tensors() for a, _ in merge_plan.active})
            raise
        written = weights.measured
        remarks += resumed_remarks(out, prepared.resumed, weights.resumed_units, weights.units) if resume else []
        require_right({name: w.ratio for name, w in written.items()})
        report = measured_report(merge_plan, out, written, verify)
        if not merge_plan.one_file:
            merge_plan = card_written(merge_plan, report, function=merge)
            write_side_files(merge_plan, staging, provenance_text(weights.inputs, report.to_dict()))
        # The index is written last: whoever sees it may rely on every shard that it names.
        for name, text in index_texts(merge_plan).items():
            write_new(staging / name, text.encode())
        prepared.require(out, *_names(merge_plan))
    # Not in the record of the output, which is the same however often the run was started.
    warnings = (*report.warnings, *remarks)
    return replace(report, warnings=warnings, seconds=round(time.monotonic() - began, 3))
