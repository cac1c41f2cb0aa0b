"""Verify that a merged model is its base plus its adapters, and tell who merged it, or what went wrong.

Every weight is held against what a merge from the same inputs would write. The weights that no adapter changes are
compared by their bytes; of the others it is found which known way of computing gives exactly their values, and where
none does, what the change is instead.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import UnsupportedError, UsageError
from loratools.execution import runner
from loratools.execution.local import worker_count
from loratools.ops.common.arguments import AdapterArgument, AdapterSource, RankFrom
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.progress import expect
from loratools.ops.merge.into_gguf import is_gguf
from loratools.ops.merge.options import GgmlType, MergeOptions
from loratools.ops.merge.outputs import Output
from loratools.ops.merge.plan import MergePlan, plan_merge
from loratools.ops.merge.quantised import dequantised_base
from loratools.ops.merge.rounding import NEAREST
from loratools.ops.merge.trained_on import AsTrained
from loratools.ops.merge.verb import load_for_merge
from loratools.ops.verify.accounting import (
    Accounts,
    Pair,
    Untouched,
    accounts,
    compare_untouched,
    config_changes,
    file_changes,
    stray_shards,
)
from loratools.ops.verify.cause import Cause
from loratools.ops.verify.diagnosis import cause_of, overflow
from loratools.ops.verify.measure import Measured, measure, recipe_of
from loratools.ops.verify.other_modules import UnexplainedWeight, deltas_of_other_modules
from loratools.ops.verify.packed import grid_name, is_alike, measure_packed, packed_weight, same_grid
from loratools.ops.verify.packed_diagnosis import packed_cause, unknown_grid
from loratools.ops.verify.recorded import reconstruct, recorded_merge
from loratools.ops.verify.replay import gives, possible_replays, replayed_cause, requantised_recipe
from loratools.ops.verify.report import Finding, Verdict, VerifiedTensor, VerifyReport
from loratools.quantization.common.protocol import PackedWeight
from loratools.short_repr import counted
from loratools.storage.held_inputs import holding_inputs
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora_experts import Orientation, Packing

# What is said where no hypothesis has explained a weight.
_WITHOUT_REASON = frozenset({"other-change", "unexplained-change"})
# Below this share of a delta in the result, even a merge by the right recipe is of little use.
_LITTLE_GAIN = 0.9
# A smaller share cannot be distinguished from a merge that was not done.
_NO_GAIN = 0.01
# Of what only loratools does.
_LORATOOLS = ("loratools",)
# What a coarse grid may make of an update: nothing where it is far below a step, twice where it is just above half of
# one.
_LEAST_GAIN, _MOST_GAIN = -0.05, 3.0


@dataclass(frozen=True)
class _Adapted:
    """The result for a weight that adapters change."""

    measured: Measured | None
    recipe: str | None
    cause: Cause | None
    programs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Context:
    """What all weights are looked at with.

    Attributes:
        names: The names of the adapters.
        recorded: Whether the merged model has a record of how it was made.
        moments_absent: The file of moments that it was rounded by and that is not here; None otherwise.
        sample: The share of the values to look at.
        requantised: The packed numbers that a merge with --requantize would write, by the name of the weight.
    """

    names: Sequence[str]
    recorded: bool
    moments_absent: str | None
    sample: float
    requantised: Mapping[str, Output]


@dataclass(frozen=True)
class _Compared:
    """The result for a weight that no adapter changes."""

    state: Untouched


@checked
@holding_inputs()
def verify(
    merged: str | Path | Checkpoint,
    base: str | Path | Checkpoint,
    adapters: Sequence[AdapterArgument] | AdapterSource,
    *,
    sample: float | None = None,
    allow_partial: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    initial: Sequence[AdapterSource] = (),
    expert_packing: Packing | None = None,
    expert_orientation: Orientation | None = None,
    trained_on: str | Path | None = None,
    moments: str | Path | None = None,
    threads: Positive | None = None,
    execution: Literal["local", "forked"] = "local",
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Tell whether `merged` is `base` with the weighted sum of `adapters` added, and nothing else.

    Nothing is written. Weights stream through blocks of rows, so that memory is that of a merge. A weight counts as
    explained where every value of it is what a known way of computing gives (see `VerifyReport.recipes`), up to the
    order in which float32 sums are added up. A merge by loratools is done again with the settings in its record, and
    compared bit by bit. Of a weight that is quantised again, every value has to be the nearest one of its grid.

    Args:
        merged: The model to look at, by its path or opened.
        base: The model that it was merged from. Of a quantised base, the dequantised values count.
        adapters: Paths, loaded adapters, or pairs of one of these and a weight, as for `merge`.
        sample: The share of the values of adapted weights to look at, in (0, 1]; all if None. With less than all, the
            verdict is at most `undecided`.
        allow_partial: Leave out of the adapters what has no place in the base.
        include: Globs over the names of modules and replaced weights that were merged; empty selects all.
        exclude: Globs of what was left out of the merge.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        from_format: The format of the adapters; detected from the content if None.
        initial: For each adapter whose initialisation changed the base, the adapter as it was before training.
        expert_packing: `peft` or `expert-major`: how the experts of a fused parameter share the columns of B.
        expert_orientation: `out-in` or `in-out`: how square fused experts are stored.
        trained_on: How the base was quantised in training, as for `merge`; what the merged model's record says if None.
        moments: The file of second moments that a merge with calibrated rounding read, as for `merge`.
        threads: Number of workers; one per CPU if None.
        execution: `local` (threads of this process) or `forked` (processes: faster, for a program without other
            threads).
        progress: Called with the number of bytes of the merged model checked since the last call.

    Returns:
        A report with a verdict: `same`, `different` or `undecided`.

    Raises:
        UsageError: An invalid argument, or an input that does not exist.
        InputError: An input is damaged, unsafe or not supported, or the inputs do not fit each other.
        MachineError: An input that changed meanwhile, or cannot be read.

    Example:
        >>> import loratools
        >>> _ = loratools.merge("fixtures/llama-tiny", "fixtures/llama-tiny-science", "merged-to-verify")
        >>> loratools.verify("merged-to-verify", "fixtures/llama-tiny", "fixtures/llama-tiny-science").verdict
        'same'
    """
    began = time.monotonic()
    share = _share(sample)
    options = MergeOptions(
        allow_partial=allow_partial,
        include=include,
        exclude=exclude,
        rank_from=rank_from,
        from_format=from_format,
        initial=initial,
        expert_packing=expert_packing,
        expert_orientation=expert_orientation,
    )
    model = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    result = merged if isinstance(merged, Checkpoint) else open_checkpoint(merged)
    options = replace(options, dequantize=model.quantisation is not None)
    recorded = recorded_merge(result.path)
    reconstructed = reconstruct(options, recorded, trained_on=trained_on, moments=moments)
    options = reconstructed.options
    if options.rounding != "nearest":
        options = replace(options, dtype=_only_dtype(result))
    weighted = [(a.selected(include, exclude), w) for a, w in load_for_merge(adapters, model, options)]
    if is_gguf(model):
        # A merge dequantises its changed weights alone; here all are compared by their values.
        plan = plan_merge(dequantised_base(model), weighted, replace(options, dequantize=False), out=result.path)
    else:
        plan = plan_merge(model, weighted, options, out=result.path)
    accounted = accounts(plan, result)
    report_bytes = progress or (lambda _: None)
    expect(progress, sum(pair.merged.nbytes for pair in accounted.pairs))
    fetch_values(model, result, *(adapter for adapter, _ in plan.active))
    names = [adapter.name for adapter in plan.adapters]
    context = _Context(
        names, recorded.present, reconstructed.moments_absent, share, _requantised(model, result, weighted, options)
    )
    looked_at = runner(execution)(
        accounted.pairs,
        lambda pair: _look_at(pair, context),
        threads=worker_count(threads),
        on_result=lambda pair, _: report_bytes(pair.merged.nbytes),
    )
    report = _report(plan, model, result, accounted, looked_at, share)
    warnings = tuple(dict.fromkeys((*reconstructed.warnings, *report.warnings)))
    return replace(report, warnings=warnings, seconds=round(time.monotonic() - began, 3))


def _share(sample: float | None) -> float:
    if sample is None:
        return 1.0
    if not 0 < sample <= 1:
        raise UsageError(f"sample is {sample}, and a share is above 0 and at most 1", hint="give 0.05 for 5 percent")
    return float(sample)


def _only_dtype(model: Checkpoint) -> str | None:
    """The dtype that the floats of a model are stored in, where that is one and is no float32."""
    dtypes = {t.dtype for t in model.weights.values() if t.dtype in FLOAT_DTYPES and packed_weight(t) is None}
    return next(iter(dtypes)).lower() if len(dtypes) == 1 else None


def _requantised(
    base: Checkpoint, merged: Checkpoint, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions
) -> Mapping[str, Output]:
    """The packed numbers that a merge with --requantize would write, by the name of the weight.

    Empty if the base or the merged model is not quantised, or a scheme is read and not written. A weight of a GGUF file
    may have another type than in the base: the one that the merged model has.
    """
    if base.quantisation is None or merged.quantisation is None or not merged.quantisation.weights:
        return {}
    stored = merged.quantisation.weights
    types = {type_name for weight in stored.values() if (type_name := _ggml_type(base, weight)) is not None}
    planned: dict[str, Output] = {}
    for requantize in (True, *sorted(types)):
        requantising = replace(options, dequantize=False, requantize=requantize, dtype=None)
        try:
            plan = plan_merge(base, adapters, requantising, out=merged.path)
        except UnsupportedError:
            continue
        for output in plan.outputs:
            name, requantised = output.merged.name, output.requantised
            if requantised is not None and name in stored and is_alike(requantised.weight, stored[name]):
                planned[name] = output
    return planned


def _ggml_type(base: Checkpoint, weight: PackedWeight) -> GgmlType | None:
    """The type of a weight in a GGUF file, where `merge --requantize TYPE` gives it."""
    names: Mapping[str, GgmlType] = {name.upper(): name for name in get_args(GgmlType)}
    return names.get(weight.parameters.format) if is_gguf(base) else None


def _look_at(pair: Pair, context: _Context) -> _Adapted | _Compared:
    """Look at one weight; what is wrong with one that follows another is that it does."""
    comparison = _compare(pair, context)
    wrong = comparison.state == "different" if isinstance(comparison, _Compared) else comparison.cause is not None
    if pair.follows is None or not wrong:
        return comparison
    message = f"weights that have to be stored on their own are not: a loader takes {pair.follows} for them"
    return _Adapted(None, None, Cause("tied-overwritten", message))


def _compare(pair: Pair, context: _Context) -> _Adapted | _Compared:
    output, stored = pair.output, pair.merged
    if not output.updates:
        return _Compared(compare_untouched(output, stored))
    if output.shape != stored.shape:
        return _Adapted(None, None, _misfit(output.shape, stored.shape))
    if stored.dtype not in FLOAT_DTYPES:
        message = f"the weights are stored as {stored.dtype}, not as floats"
        return _Adapted(None, None, Cause("not-floats", message))
    output = replace(output, dtype=stored.dtype)
    changing = [context.names[i] for i in sorted({update.adapter for update in output.updates})]
    if (packed := packed_weight(stored)) is not None:
        return _compare_packed(stored, output, packed, changing, context)
    measured = measure(output, stored, sample=context.sample)
    # Programs round what is too large to infinity and go on: the recipe is right, and the weight is lost.
    if measured.recipe is not None and stored.dtype == "F16" and (lost := overflow(output, stored)) is not None:
        return _Adapted(measured, None, lost)
    if measured.recipe is not None:
        programs = measured.recipe.programs(output.dtype)
        return _Adapted(measured, _with_training(str(measured.recipe), output), None, programs)
    cause = None if output.rounding != NEAREST else cause_of(output, stored, measured.fit, changing, context.sample)
    if cause is None or cause.undecided:
        replays = possible_replays(output, recorded=context.recorded)
        replay = next((replay for replay in replays if gives(replay, output, stored)), None)
        if replay is not None:
            return _Adapted(measured, _with_training(str(replay), output), None, _LORATOOLS)
    cause = cause or cause_of(output, stored, measured.fit, changing, context.sample)
    if cause.undecided and context.moments_absent is not None:
        cause = _without_moments(context.moments_absent)
    return _Adapted(measured, None, cause)


def _with_training(recipe: str, output: Output) -> str:
    """The recipe, with the values that the deltas were added to where these are not the base's."""
    source = output.values.source
    return f"{recipe}, added to what {source.scheme} makes of the base" if isinstance(source, AsTrained) else recipe


def _without_moments(name: str) -> Cause:
    message = (
        "the adapters were applied as given, up to one rounding; by the record of the model that was --rounding "
        f"calibrated with {name}, which is not here: give it with --moments to have the rounding done again"
    )
    return Cause("moments-absent", message, undecided=True)


def _compare_packed(
    stored: LazyTensor, output: Output, packed: PackedWeight, changing: Sequence[str], context: _Context
) -> _Adapted:
    """Look at a weight that the merged model stores on the grid of a quantisation scheme."""
    measured = measure_packed(output, packed, sample=context.sample)
    if measured is None:
        fit = measure(output, stored, sample=context.sample).fit
        return _Adapted(Measured(None, fit, None), None, unknown_grid(fit, packed))
    of_merge = Measured(None, measured.fit, measured.max_error_ratio)
    planned = context.requantised.get(output.name)
    recipe = requantised_recipe(planned, packed, recorded=context.recorded) if planned is not None else None
    programs = _LORATOOLS if recipe is not None else ()
    if recipe is None and measured.nearest and _credible(measured.fit.gain):
        recipe = f"deltas in float32, each sum stored as the nearest value of {grid_name(packed)}"
    if recipe is not None:
        return _Adapted(of_merge, _with_training(recipe, output), None, programs)
    if planned is not None and (cause := replayed_cause(planned, packed, changing)) is not None:
        return _Adapted(of_merge, None, cause)
    base = packed_weight(output.values)
    scales_kept = base is not None and same_grid(base, packed)
    cause = packed_cause(output, packed, measured, changing, kept_scales=scales_kept, sample=context.sample)
    if cause.undecided and context.moments_absent is not None:
        cause = _without_moments(context.moments_absent)
    return _Adapted(of_merge, None, cause)


def _credible(gain: float | None) -> bool:
    """Whether a grid may have made so much of an update: from nothing to twice of it, but never its opposite."""
    return gain is None or _LEAST_GAIN <= gain <= _MOST_GAIN


def _misfit(expected: tuple[int, ...], shape: tuple[int, ...]) -> Cause:
    if len(expected) == len(shape) and expected[1:] == shape[1:]:
        verb = "cut" if shape[0] < expected[0] else "extended"
        return Cause("vocabulary-cut", f"the rows were {verb} from {expected[0]} to {shape[0]}")
    return Cause("shape", f"the shape is {list(shape)} in place of {list(expected)}")


def _report(
    plan: MergePlan,
    base: Checkpoint,
    merged: Checkpoint,
    accounted: Accounts,
    looked_at: Sequence[_Adapted | _Compared],
    sample: float,
) -> VerifyReport:
    by_pair = list(zip(accounted.pairs, looked_at, strict=True))
    adapted = _as_one_program_merges([(pair, one) for pair, one in by_pair if isinstance(one, _Adapted)], sample)
    adapted = _with_other_modules(adapted, sample)
    compared = [(pair, one) for pair, one in by_pair if isinstance(one, _Compared)]
    replaced = [(pair, one) for pair, one in compared if pair.output.touched]
    untouched = [one for pair, one in compared if not pair.output.touched]
    different = tuple(
        pair.output.name for pair, one in compared if one.state == "different" and not pair.output.touched
    )
    measured = [one.measured for _, one in adapted if one.measured is not None]
    energy = sum(m.fit.energy for m in measured)
    gain = sum(sum(m.fit.along) for m in measured) / energy if energy > 0 else None
    findings = [
        *_causes(adapted),
        *_replaced(replaced),
        *_resized(compared),
        *_names(accounted, _of_the_same_shape(compared), len(untouched)),
        *_folder(merged),
        *_gain(adapted, gain),
    ]
    if sample < 1:
        message = f"only {sample:.3g} of the values of adapted weights were looked at"
        findings.append(Finding("sampled", message, undecided=True))
    recipes = Counter(one.recipe for _, one in adapted if one.recipe is not None)
    return VerifyReport(
        merged=merged.path,
        verdict=_verdict(findings),
        diagnosis=tuple(findings),
        recipes=tuple(recipes.most_common()),
        merged_by=_merged_by(adapted),
        tensors=tuple(_tensor(pair, one) for pair, one in adapted),
        replaced=sum(1 for _, one in replaced if one.state != "different"),
        same=sum(1 for one in untouched if one.state == "same"),
        cast=sum(1 for one in untouched if one.state == "cast"),
        different=different,
        missing=accounted.missing,
        unexplained=accounted.unexplained,
        config_changes=config_changes(base, merged),
        file_changes=file_changes(plan, merged),
        gain=gain,
        sample=sample,
        seconds=0.0,
        warnings=tuple(dict.fromkeys((*plan.warnings, *merged.warnings, *_little_gain(adapted, gain)))),
    )


def _merged_by(adapted: Sequence[tuple[Pair, _Adapted]]) -> tuple[str, ...]:
    """The programs that merge in all of the identified ways."""
    by_weight = [one.programs for _, one in adapted if one.recipe is not None]
    first = by_weight[0] if by_weight else ()
    return tuple(program for program in first if all(program in programs for programs in by_weight))


def _as_one_program_merges(adapted: Sequence[tuple[Pair, _Adapted]], sample: float) -> list[tuple[Pair, _Adapted]]:
    """The weights with recipes of one program, where one explains them all.

    Several recipes give the values of a small weight, of which only the first is reported. Where no program follows the
    recipes of all weights, those of the recipe with the most values are tried on the weights that have others.
    """
    same = list(adapted)
    recipes = [one.measured.recipe if one.measured is not None else None for _, one in adapted]
    if _merged_by(adapted) or any(one.recipe is None for _, one in adapted) or None in recipes:
        return same
    values: Counter[tuple[str, ...]] = Counter()
    for pair, one in adapted:
        values[one.programs] += pair.merged.elements
    programs = values.most_common(1)[0][0] if values else ()
    for i, (pair, one) in enumerate(adapted):
        if set(one.programs) & set(programs):
            continue
        output = replace(pair.output, dtype=pair.merged.dtype)
        recipe = recipe_of(programs, output, pair.merged, sample=sample)
        if recipe is None or one.measured is None:
            return list(adapted)
        measured = replace(one.measured, recipe=recipe)
        same[i] = pair, _Adapted(measured, _with_training(str(recipe), output), None, recipe.programs(output.dtype))
    return same


def _with_other_modules(adapted: Sequence[tuple[Pair, _Adapted]], sample: float) -> list[tuple[Pair, _Adapted]]:
    """The weights, where those that nothing has explained may have been changed by the delta of another one."""
    unexplained = [
        UnexplainedWeight(replace(pair.output, dtype=pair.merged.dtype), pair.merged, one.measured.fit)
        for pair, one in adapted
        if one.cause is not None and one.cause.code in _WITHOUT_REASON and one.measured is not None
        if packed_weight(pair.merged) is None
    ]
    causes = deltas_of_other_modules(unexplained, [pair.output for pair, _ in adapted], sample)
    return [
        (pair, replace(one, cause=causes[pair.output.name]) if pair.output.name in causes else one)
        for pair, one in adapted
    ]


def _verdict(findings: Sequence[Finding]) -> Verdict:
    if any(not finding.undecided for finding in findings):
        return "different"
    return "undecided" if findings else "same"


def _tensor(pair: Pair, one: _Adapted) -> VerifiedTensor:
    measured, cause = one.measured, one.cause
    return VerifiedTensor(
        name=pair.output.name,
        recipe=one.recipe,
        max_error_ratio=measured.max_error_ratio if measured is not None else None,
        weights=measured.fit.weights() if measured is not None else (),
        gain=measured.fit.gain if measured is not None else None,
        ok=True if cause is None else None if cause.undecided else False,
    )


def _causes(adapted: Sequence[tuple[Pair, _Adapted]]) -> list[Finding]:
    """One finding for each cause, with all the weights that have it."""
    names: dict[Cause, list[str]] = defaultdict(list)
    for pair, one in adapted:
        if one.cause is not None:
            names[one.cause].append(pair.output.name)
    ordered = sorted(names.items(), key=lambda item: -len(item[1]))
    return [
        Finding(cause.code, cause.message + _numbers(cause, of, adapted), tuple(of), cause.undecided)
        for cause, of in ordered
    ]


def _numbers(cause: Cause, names: Sequence[str], adapted: Sequence[tuple[Pair, _Adapted]]) -> str:
    """What is said of a cause beside its message: how many weights lack an update, and in which files; cosines."""
    chosen = set(names)
    of_cause = [(pair, one) for pair, one in adapted if pair.output.name in chosen]
    if cause.code == "not-applied" and len(names) < len(adapted):
        files = {_file_of(pair) for pair, _ in of_cause}
        others = {_file_of(pair) for pair, _ in adapted if pair.output.name not in chosen}
        only_files = ", ".join(sorted(name for name in files if name is not None))
        whose = f", all those of {only_files}" if only_files and not files & others else ""
        return f" to them ({len(names):,} of {counted(len(adapted), 'weight')}{whose})"
    cosines = [one.measured.fit.cosine for _, one in of_cause if one.measured is not None]
    if cause.code != "unexplained-change" or not cosines or len(cosines) < len(of_cause):
        return ""
    low, high = f"{min(cosines):.2f}", f"{max(cosines):.2f}"
    return f" (cosine with them {low})" if low == high else f" (cosine with them {low} to {high})"


def _file_of(pair: Pair) -> str | None:
    location = pair.merged.location
    return location.file.path.name if location is not None else None


def _replaced(replaced: Sequence[tuple[Pair, _Compared]]) -> list[Finding]:
    wrong = tuple(pair.output.name for pair, one in replaced if one.state == "different")
    if not wrong:
        return []
    return [Finding("replacement-missing", "the weights that an adapter puts in place are not there", wrong)]


def _of_the_same_shape(compared: Sequence[tuple[Pair, _Compared]]) -> tuple[str, ...]:
    """The names of untouched weights that have other values in the shape of the base."""
    return tuple(
        pair.output.name
        for pair, one in compared
        if one.state == "different" and not pair.output.touched and pair.output.shape == pair.merged.shape
    )


def _resized(compared: Sequence[tuple[Pair, _Compared]]) -> list[Finding]:
    """One finding for each way in which untouched weights have another shape than in the base."""
    names: dict[Cause, list[str]] = defaultdict(list)
    for pair, one in compared:
        if one.state == "different" and not pair.output.touched and pair.output.shape != pair.merged.shape:
            names[_misfit(pair.output.shape, pair.merged.shape)].append(pair.output.name)
    return [Finding(cause.code, cause.message, tuple(resized)) for cause, resized in names.items()]


def _names(accounted: Accounts, different: tuple[str, ...], untouched: int) -> list[Finding]:
    findings: list[Finding] = []
    if different:
        all_differ = len(different) == untouched
        message = (
            "no weight that the adapters leave alone is that of the base: it was merged from another base"
            if all_differ
            else f"{len(different)} of {untouched} weights that no adapter changes differ from the base"
        )
        findings.append(Finding("other-base" if all_differ else "untouched-changed", message, different))
    if accounted.missing:
        findings.append(Finding("missing", "weights of the base are not there", accounted.missing))
    if accounted.unexplained:
        findings.append(
            Finding("unexplained", "there are weights that neither base nor adapter has", accounted.unexplained)
        )
    return findings


def _folder(merged: Checkpoint) -> list[Finding]:
    findings: list[Finding] = []
    if "quantization_config" in merged.config and not (merged.quantisation and merged.quantisation.weights):
        message = "config.json says that the weights are quantised, and they are floats: a runtime will refuse them"
        findings.append(Finding("quantization-left", message, ("config.json",)))
    if stray := stray_shards(merged):
        findings.append(Finding("stray-shards", "files of weights that the index does not name", stray))
    return findings


def _gain(adapted: Sequence[tuple[Pair, _Adapted]], gain: float | None) -> list[Finding]:
    """A correct merge whose result equals the base: its values are those of the base."""
    right = [pair for pair, one in adapted if one.cause is None]
    if gain is None or gain >= _NO_GAIN or len(right) != len(adapted):
        return []
    dtype = right[0].merged.dtype
    message = f"{dtype} cannot hold the change: merged or not, these weights have the same values"
    return [Finding("nothing-survived", message, tuple(pair.output.name for pair in right), undecided=True)]


def _little_gain(adapted: Sequence[tuple[Pair, _Adapted]], gain: float | None) -> list[str]:
    """A warning where all is right, and rounding lost much of it."""
    if gain is None or not _NO_GAIN <= gain < _LITTLE_GAIN or any(one.cause is not None for _, one in adapted):
        return []
    dtype = adapted[0][0].merged.dtype
    return [f"only {gain:.1%} of the change survived the rounding to {dtype}"]
