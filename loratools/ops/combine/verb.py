"""combine: turn several weighted adapters into one, module by module, in core coordinates.

    dW = method([(w_1, dW_1), (w_2, dW_2), ...])        `linear`: the exact weighted sum

A method (`methods/`) sees what the adapters have for one module. Everything else is in this room: modules that only
some adapters have, weights per module, steps after the method, truncation, storing, how much of each adapter is in the
result, and which notes of the sources stay true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.arguments import Globs, Positive, checked
from loratools.errors import UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats import Base
from loratools.formats.common.leave_out import LeaveOut
from loratools.ops.combine.adapter import base_warnings, combined_adapter
from loratools.ops.combine.card import combine_card
from loratools.ops.combine.finished import finished_module, keep_module
from loratools.ops.combine.heads import combined_replacements
from loratools.ops.combine.modules import CombinedModules, WeightedUpdate, combined_modules, selected_names
from loratools.ops.combine.one_module import ModuleResult, combine_module
from loratools.ops.combine.recipe import (
    Calibration,
    HeadsRule,
    Ingredient,
    Recipe,
    ingredients,
    overridden,
    read_recipe,
)
from loratools.ops.combine.report import CombineReport
from loratools.ops.combine.residual import residual_updates
from loratools.ops.combine.settings import ModuleSettings
from loratools.ops.combine.shares import share_of
from loratools.ops.common.arguments import AdapterArgument, AdapterSource, RankFrom
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.opening import AdapterOutput, open_adapters
from loratools.ops.common.output import refuse_unrelated
from loratools.ops.common.progress import bytes_of, expect
from loratools.ops.common.result_options import result_options
from loratools.ops.common.resumable_work import require_output, resumable_work
from loratools.ops.common.run_plans import adapters_plan
from loratools.ops.common.same_invocation import require_same_invocation
from loratools.ops.common.same_layers import require_same_layers
from loratools.ops.lowrank.experts import together
from loratools.ops.lowrank.finished import FinishedModules
from loratools.ops.lowrank.reduce import overall_error
from loratools.storage.held_inputs import holding_inputs
from loratools.updates.lora_experts import Packing

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def combine(
    adapters: Sequence[AdapterArgument] | AdapterSource = (),
    out: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    module_weights: Mapping[str, float | Sequence[float]] | None = None,
    block_weights: Sequence[Sequence[float]] = (),
    heads: HeadsRule | None = None,
    calibrate: Calibration | None = None,
    norm_match: bool = False,
    residual: str | Path | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    expert_packing: Packing | None = None,
    from_format: str | None = None,
    format: str | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    threads: Positive | None = None,
    progress: Callable[[int], None] | None = None,
    card: bool = True,
    plan: bool = False,
    resume: bool = False,
) -> CombineReport:
    """Return one adapter that does what several adapters do together; write it to `out` if that is given.

    Everything is computed in float64 and stored with scale 1. A module that only one adapter has, with weight 1, keeps
    its tensors byte for byte, unless it is truncated, cast or changed by the method. Errors are measured on the stored
    values.

    Args:
        adapters: Paths, loaded adapters, or pairs of one of these and a weight (1 if none is given). The weight
            multiplies the delta. An adapter of weight 0 takes no part.
        out: Where to write the result; None writes nothing.
        recipe: A YAML file with any of the settings below. Arguments of this call take precedence.
        method: One of `list_methods()`; `linear` if None and the recipe names none.
        options: Options of the method by name, as `list_methods()` lists them.
        rank: Truncate each module to this rank. Without `rank` and `energy`, ranks add up.
        energy: Truncate each module to the smallest rank that keeps this share of its squared Frobenius norm, in (0,
            1].
        max_rank: With `energy`: the largest rank of any module.
        module_weights: For each glob, a factor for the weights of matching modules: one number for all adapters, or one
            for each. If several globs match a module, the last one applies.
        block_weights: Block weights as kohya's scripts take them, 12, 17, 20 or 26 numbers: one list for all adapters,
            or one for each.
        heads: What to do if adapters replace a weight with different values: `refuse` (the default), `first` or
            `average`.
        calibrate: `svc`: rescale singular values that several adapters share.
        norm_match: After combining, scale each module to the norm `sum of |weight| |delta|` over the adapters.
        residual: Where to write a second adapter with what the truncation lost. Both adapters together are the exact
            result.
        seed: Random seed of methods that draw random numbers; 0 if None.
        dtype: The dtype of the stored factors; if None, the widest dtype among the sources of each module.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        include: Globs over the module names of all adapters together; empty selects all.
        exclude: Globs of names to leave out.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        from_format: The format of the adapters; detected from the content if None.
        format: The format to write, one of `list_formats()`. If None: the format of the adapters if they agree,
            otherwise peft.
        base: The base model, needed if module names alone are ambiguous: a path, an opened checkpoint, or a `Base`.
        threads: Number of workers; one per CPU if None. The result does not depend on it.
        progress: Called with the number of bytes read since the last call.
        card: Write a model card (`README.md`) into an output folder.
        plan: Compute the result and its report, and write nothing.
        resume: Go on with a killed run of the same plan, which gives the bytes of an undisturbed run. With other
            inputs, options or versions it is refused; where no run was killed, the work begins anew.

    Returns:
        A report with the ranks and errors of all modules and, for each adapter, how much of it is in the result.
        `report.adapter` is the result; it is None if `plan` is True.

    Raises:
        UsageError: An option, weight or method does not exist or does not apply;
            or a killed run had something else to do.
        ChangedInputError: An input changed meanwhile, or since the run was killed.
        MismatchError: Adapters differ in the shape of a module, or in a replaced weight.
        UnsupportedError: The scale of an adapter is uncertain, or an update is not low rank.
        InputError: Values are NaN or infinite, or too large for the dtype.
        FormatError: The recipe is invalid.
        OutputExistsError: `out` exists and may not be replaced, or is one of the inputs.

    Example:
        >>> import loratools
        >>> pair = [("fixtures/llama-tiny-science", 0.7), ("fixtures/llama-tiny-shakespeare", 0.3)]
        >>> report = loratools.combine(pair, "both", rank=16)
        >>> [share.weight for share in report.adapters]
        [0.7, 0.3]
    """
    card_options = result_options(combine, locals(), inputs=["adapters"])
    arguments = {
        "adapters": ingredients(adapters, module_weights or {}, block_weights),
        "method": method,
        "set": options,
        "rank": rank,
        "energy": energy,
        "max_rank": max_rank,
        "heads": heads,
        "calibrate": calibrate,
        "norm_match": norm_match,
        "seed": seed,
        "dtype": dtype,
        "include": tuple(include),
        "exclude": tuple(exclude),
    }
    require_output(out, resume=resume)
    followed = overridden(read_recipe(recipe) if recipe is not None else Recipe(), arguments)
    settings = ModuleSettings.from_recipe(followed)
    opened = open_adapters(
        [(ingredient.adapter, ingredient.weight) for ingredient in followed.adapters],
        out,
        format=format,
        base=base,
        rank_from=rank_from,
        expert_packing=expert_packing,
        from_format=from_format,
        overwrite=overwrite,
        leave_out=LeaveOut.of(followed.include, followed.exclude),
    )
    sources, output = opened.weighted, opened.output
    participants = [i for i, (_, weight) in enumerate(sources) if weight]
    taking_part = [sources[i][0] for i in participants]
    require_same_layers(taking_part, hint="merge them one at a time")
    require_same_invocation(taking_part)
    refuse_unrelated(taking_part)
    residual_output = replace(output, path=Path(residual) if residual is not None else None)
    output.check()
    _check_residual(residual_output, output)

    selected = selected_names(sources, followed.include, followed.exclude)
    modules = combined_modules(sources, followed, settings, selected=selected, participants=participants)
    replacements, replacement_warnings = combined_replacements(sources, selected, participants, followed.heads)
    warnings = [*opened.warnings, *base_warnings(taking_part), *replacement_warnings]
    if unweighted := modules.without_weight:
        warnings.append(f"{len(unweighted)} modules have weight 0 everywhere and are left out: {unweighted[0]}, ...")
    warnings += [f"'{adapter.name}': {text}" for adapter, _ in sources for text in adapter.warnings]

    fetch_values(*taking_part)
    options_of_result = {
        **{name: value for name, value in followed.to_dict().items() if name != "adapters"},
        "residual": residual is not None,
        "format": output.format,
        "rank_from": rank_from,
        "expert_packing": expert_packing,
        "from_format": from_format,
    }
    with resumable_work(
        None if plan else output.named_path,
        lambda: adapters_plan(
            "combine",
            taking_part,
            output.base,
            options_of_result,
            weights=[_weights_of(ingredient) for ingredient in followed.adapters],
        ),
        resume=resume,
        input_bytes=bytes_of(u.update for updates in modules.updates.values() for u in updates),
    ) as work:
        results = _combined(
            modules,
            settings,
            FinishedModules(work.store),
            residual=residual is not None,
            progress=progress,
            threads=worker_count(threads),
        )
        updates = together({name: r.update for name, r in results.items()}, modules.fused_experts)
        result = combined_adapter(taking_part, updates, replacements, followed.to_dict())
        lines = tuple(r.line for r in results.values())
        shares = tuple(share_of(i, a, w, [r.parts for r in results.values()]) for i, (a, w) in enumerate(sources))
        model_card = combine_card(sources, shares, lines, card_options, combine, result.base_model, warnings)
        warnings += output.save(result, plan=plan, card=model_card if card else None)
        lost = {name: r.lost for name, r in results.items() if r.lost is not None}
        residual_bytes: int | None = None
        if residual is not None and not lost:
            warnings.append("nothing was lost, so there is no residual to write")
        elif residual is not None:
            lost_updates = residual_updates(lost, updates, modules.fused_experts)
            difference = replace(result, updates=lost_updates, replacements={})
            warnings += residual_output.save(difference, plan=plan)
            residual_bytes = sum(t.nbytes for t in difference.tensors().values())
        warnings += work.remarks()
    return CombineReport(
        modules=lines,
        adapters=shares,
        error=overall_error(lines),
        output=None if plan else output.path,
        adapter=None if plan else result,
        bytes=sum(t.nbytes for t in result.tensors().values()),
        warnings=tuple(warnings),
        recipe=followed.to_dict(),
        residual=residual_output.path if lost and not plan else None,
        residual_bytes=residual_bytes,
    )


def _weights_of(ingredient: Ingredient) -> str:
    """The weights of an adapter in words: of all its modules, then by glob, and by block."""
    by_glob = [f"{glob}={weight!r}" for glob, weight in ingredient.modules.items()]
    by_block = [f"blocks {','.join(map(repr, ingredient.blocks))}"] if ingredient.blocks else []
    return "; ".join([repr(ingredient.weight), *by_glob, *by_block])


def _combined(
    modules: CombinedModules,
    settings: ModuleSettings,
    finished: FinishedModules,
    *,
    residual: bool,
    progress: Callable[[int], None] | None,
    threads: int,
) -> dict[str, ModuleResult]:
    """The result of each module, by name, in the order of the modules; what a killed run has done is not done again."""

    def combined(item: tuple[str, Sequence[WeightedUpdate]]) -> ModuleResult:
        name, updates = item
        result = finished_module(finished, name, updates)
        if result is None:
            result = combine_module(name, updates, settings, residual=residual)
            keep_module(finished, name, updates, result)
        if progress is not None:
            progress(bytes_of(u.update for u in updates))
        return result

    expect(progress, bytes_of(u.update for updates in modules.updates.values() for u in updates))
    with single_threaded_torch():
        in_order = run(list(modules.updates.items()), combined, threads=threads)
    return dict(zip(modules.updates, in_order, strict=True))


def _check_residual(residual: AdapterOutput, combination: AdapterOutput) -> None:
    """Refuse a residual whose path may not be written, or lies inside the combination or contains it."""
    residual.check()
    if residual.path is None or combination.path is None:
        return
    place, other = residual.path.resolve(), combination.path.resolve()
    if place == other or place in other.parents or other in place.parents:
        raise UsageError(
            f"the residual '{residual.path}' would be written over the combination, or inside it",
            hint="give --residual another path",
        )
