"""resize: replace each module of an adapter by the nearest one of smaller rank, in Frobenius norm.

The result is exact, and computed from the factors (`algebra.lowrank`): the best approximation of rank k of a product of
thin factors costs two thin QR decompositions and the SVD of a small core. A budget for the whole adapter is distributed
over its modules by their singular values (`budget`), so that the total loss is smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, Size, byte_size, checked
from loratools.errors import UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats import Base
from loratools.formats.common.edited_metadata import EditedMetadata
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.notes import lora_notes
from loratools.ops.card.adapter_card import AdapterCard, rank_text
from loratools.ops.card.inputs import card_input
from loratools.ops.common.arguments import RankFrom
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.opening import open_adapters
from loratools.ops.common.progress import bytes_of, expect
from loratools.ops.common.result_options import result_options
from loratools.ops.common.resumable_work import require_output, resumable_work
from loratools.ops.common.run_plans import adapters_plan
from loratools.ops.lowrank.experts import apart, together
from loratools.ops.lowrank.factors import exact_factors, is_vector, layout_of, require_factors
from loratools.ops.lowrank.finished import FinishedModules
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import ReducedModule, overall_error, passed_through, reduced, update_dtype
from loratools.ops.resize.budget import Budget, limits_within
from loratools.ops.resize.report import ResizeReport
from loratools.storage.casting import stored_dtype
from loratools.storage.held_inputs import holding_inputs
from loratools.updates.lora_experts import Packing
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def resize(
    adapter: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    rule: tuple[str, float] | None = None,
    max_size: Size | None = None,
    max_params: int | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    expert_packing: Packing | None = None,
    from_format: str | None = None,
    format: str | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    set_metadata: Mapping[str, str] | None = None,
    strip_metadata: bool = False,
    threads: Positive | None = None,
    progress: Callable[[int], None] | None = None,
    card: bool = True,
    plan: bool = False,
    resume: bool = False,
) -> ResizeReport:
    """Return the adapter with smaller ranks: each module becomes the nearest one in Frobenius norm.

    Exactly one of `rank`, `energy`, `error`, `rule`, `max_size` and `max_params` chooses the ranks. A LoRA module at or
    below its rank keeps its tensors byte for byte, unless `dtype` is given. All others are stored with scale 1, with
    their singular values split evenly between A and B; other kinds become LoRA. Replaced weights, and changes of
    vectors, are kept. Everything is computed in float64, and errors are measured on the stored values.

    Args:
        adapter: The adapter: a path or a loaded adapter.
        out: Where to write the result; None writes nothing.
        rank: The largest rank of any module.
        energy: The smallest rank that keeps at least this share of each module's squared Frobenius norm, in (0, 1].
        error: The smallest rank with at most this relative Frobenius error in each module, in (0, 1).
        rule: A rule of kohya's resize script and its number: `("sv_ratio", 20)`, `("sv_cumulative", 0.9)` or
            `("sv_fro", 0.9)`.
        max_size: The largest size of the file of weights, in bytes or as "5MB". Ranks are distributed over the modules
            so that the total loss is smallest.
        max_params: The largest number of parameters, distributed in the same way.
        max_rank: The largest rank of any module, in addition to the rule.
        dtype: The dtype of the stored factors; if None, each module keeps its own.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        include: Globs over module names; empty selects all.
        exclude: Globs of names to leave out.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        from_format: The format of the adapter; detected from the content if None.
        format: The format to write, one of `list_formats()`. If None: the format of the adapter if loratools writes it,
            otherwise peft.
        base: The base model, needed if module names alone are ambiguous: a path, an opened checkpoint, or a `Base`.
        set_metadata: Texts for the header of the file: `{"modelspec.title": "Ink"}`. An empty text removes the key.
        strip_metadata: Leave out the texts in the header of the source, such as prompts and training settings.
        threads: Number of workers; one per CPU if None. The result does not depend on it.
        progress: Called with the number of bytes read since the last call.
        card: Write a model card (`README.md`) into an output folder.
        plan: Compute the result and its report, and write nothing.
        resume: Go on with a killed run of the same plan, which gives the bytes of an undisturbed run. With other
            inputs, options or versions it is refused; where no run was killed, the work begins anew.

    Returns:
        A report of ranks and errors. `report.adapter` is the result; it is None if `plan` is True.

    Raises:
        UsageError: Not exactly one rule is given, or the limit is too small even for rank 1 everywhere;
            or a killed run had something else to do.
        ChangedInputError: An input changed meanwhile, or since the run was killed.
        UnsupportedError: The scale of the adapter is uncertain, or an update is not low rank.
        InputError: Values are NaN or infinite, or too large for the dtype.
        OutputExistsError: `out` exists and may not be replaced, or is the input.

    Example:
        >>> import loratools
        >>> report = loratools.resize("fixtures/llama-tiny-science", "science-4", rank=4)
        >>> report.adapter["model.layers.0.self_attn.q_proj"].rank
        4
    """
    options = result_options(resize, locals(), inputs=["adapter"])
    require_output(out, resume=resume)
    metadata = EditedMetadata(set_metadata or {}, strip_metadata)
    limit = Limit(rank, energy, error, rule, max_rank)
    budget = _budget(limit, byte_size(max_size) if max_size is not None else None, max_params)
    cast_to = stored_dtype(dtype) if dtype is not None else None
    opened = open_adapters(
        [(adapter, 1.0)],
        out,
        format=format,
        base=base,
        rank_from=rank_from,
        expert_packing=expert_packing,
        from_format=from_format,
        overwrite=overwrite,
        leave_out=LeaveOut.of(include, exclude),
    )
    opened.output.check()
    metadata.check(opened.output.format)
    source = opened.weighted[0][0].selected(include, exclude)
    warnings = [*opened.warnings, *source.warnings]

    fetch_values(source)
    # Each expert of a fused parameter is a matrix with a rank of its own.
    modules, fused_experts = apart(source.updates)
    require_factors(modules.items())
    workers = worker_count(threads)
    options_of_result = {
        **{name: value for name, value in options.items() if name != "base"},
        "max_size": budget.amount if budget is not None and budget.in_bytes else None,
        "dtype": cast_to,
        "format": opened.output.format,
    }
    with resumable_work(
        None if plan else opened.output.named_path,
        lambda: adapters_plan("resize", [source], opened.output.base, options_of_result),
        resume=resume,
        input_bytes=bytes_of(modules.values()),
    ) as work:
        finished = FinishedModules(work.store)
        limits: Mapping[str, Limit] = dict.fromkeys(modules, limit)
        if budget is not None:
            split = replace(source, updates=modules)
            limits = limits_within(budget, split, dtype=cast_to, max_rank=max_rank, workers=workers, finished=finished)

        def resized(item: tuple[str, Update]) -> tuple[Update, ReducedModule]:
            name, update = item
            result = _finished(finished, name, update)
            if result is None:
                result = _resized(name, update, source.name, limits, cast_to)
                _keep(finished, name, update, *result)
            if progress is not None:
                progress(bytes_of((update,)))
            return result

        expect(progress, bytes_of(modules.values()))
        with single_threaded_torch():
            results = dict(zip(modules, run(list(modules.items()), resized, threads=workers), strict=True))
        updates = together({name: update for name, (update, _) in results.items()}, fused_experts)
        result = replace(source, updates=updates, path=None, warnings=(), notes=lora_notes(source.notes, updates))
        result = metadata.of(result)
        lines = tuple(line for _, line in results.values())
        facts = [
            ("modules", f"{len(lines):,}"),
            ("rank before", rank_text([line.rank_in for line in lines])),
            ("rank", rank_text([line.rank for line in lines])),
            ("relative error", f"{overall_error(lines):.4g}"),
        ]
        origin = card_input(source.path)
        title = f"{origin.name}, resized"
        model_card = AdapterCard(
            "resize", title, source.base_model, [origin], [origin.name], options, resize, facts, warnings
        )
        warnings += opened.output.save(result, plan=plan, card=model_card if card else None)
        warnings += work.remarks()
    return ResizeReport(
        modules=lines,
        error=overall_error(lines),
        unchanged=sum(update is modules[name] for name, (update, _) in results.items()),
        output=None if plan else opened.output.path,
        adapter=None if plan else result,
        bytes=sum(t.nbytes for t in result.tensors().values()),
        warnings=tuple(warnings),
    )


def _budget(limit: Limit, max_size: int | None, max_params: int | None) -> Budget | None:
    """The budget for all modules together; None if each module has its own limit.

    Raises:
        UsageError: Not exactly one of the rules that choose ranks is given.
    """
    budgets = {"--max-size": max_size, "--max-params": max_params}
    given_options = [name for name, value in budgets.items() if value is not None]
    rules = [f"--{n}" for n in ("rank", "energy", "error", "rule") if getattr(limit, n) is not None]
    if len(given_options + rules) > 1:
        raise UsageError(f"{' and '.join(rules + given_options)} exclude each other", hint="give one of them")
    if not limit.is_given and not given_options:
        raise UsageError(
            "no rule for the ranks is given",
            hint="give one of --rank, --energy, --error, --rule, --max-size and --max-params",
        )
    if max_size is not None:
        return Budget(max_size, in_bytes=True)
    return Budget(max_params, in_bytes=False) if max_params is not None else None


def _resized(
    name: str, update: Update, adapter_name: str, limits: Mapping[str, Limit], dtype: str | None
) -> tuple[Update, ReducedModule]:
    """One module reduced to its limit, as it is stored, and its row in the report. Vectors are kept."""
    factors = exact_factors(update, name, adapter_name)
    if is_vector(update):
        stored = passed_through(update, factors, name, dtype).stored
        return stored.update, stored.module(name, None, None)
    nearest = reduced(
        factors,
        limits[name],
        name,
        dtype or update_dtype(update),
        unchanged=update.as_lora(),
        unchanged_dtype=dtype,
        layout=layout_of(update),
    )
    return nearest.stored.update, nearest.stored.module(name, factors.rank, nearest.factors.rank)


def _finished(finished: FinishedModules, name: str, update: Update) -> tuple[Update, ReducedModule] | None:
    """One module that a killed run has resized, and its line in the report; None where it must be resized."""
    module = finished.finished(name, [update])
    try:
        return None if module is None else (module.updates["stored"], ReducedModule(name, *module.facts["line"]))
    except (KeyError, TypeError):
        return None  # not as it is written here


def _keep(finished: FinishedModules, name: str, update: Update, stored: Update, line: ReducedModule) -> None:
    """Set a module that is resized aside; raises MachineError."""
    finished.keep(name, [update], {"stored": stored}, {"line": line.numbers})
