"""Merge weighted adapters into a model in memory, with the same values, bit for bit, as a merge of its files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.arguments import Globs, Positive, checked
from loratools.errors import InputError, MismatchError, UnsupportedError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.ops.common.arguments import AdapterArgument, AdapterSource, RankFrom
from loratools.ops.common.finite import refuse_not_finite
from loratools.ops.merge.journal import Written
from loratools.ops.merge.model_in_memory import ModelInMemory
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outcome import measured_report
from loratools.ops.merge.outputs import Output, OutputFile
from loratools.ops.merge.plan import MergePlan, rows_units
from loratools.ops.merge.report import MergeReport
from loratools.ops.merge.rounding import RoundingMode
from loratools.ops.merge.rows import merge_blocks
from loratools.ops.merge.verb import load_for_merge
from loratools.ops.merge.weights import MergedWeights, merged_weights
from loratools.storage.held_inputs import holding_inputs
from loratools.updates.lora_experts import Orientation, Packing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@checked(Module="torch.nn")
@holding_inputs()
def merge_into(
    model: Module,
    adapters: Sequence[AdapterArgument] | AdapterSource,
    *,
    rounding: RoundingMode = "nearest",
    seed: int = 0,
    penalty: float | None = None,
    moments: str | Path | None = None,
    allow_partial: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    initial: Sequence[AdapterSource] = (),
    expert_packing: Packing | None = None,
    expert_orientation: Orientation | None = None,
    threads: Positive | None = None,
) -> MergeReport:
    """Add weighted adapters to the weights of a model in memory: `W' = round(W + sum of weight * dW)`.

    Sums are formed in float32 (float64 for float64 weights) and rounded once to the dtype of each parameter, exactly as
    `merge` does with files. All new values are computed before the first one is stored, so an error leaves the model
    unchanged. The new values need as much memory as the changed weights.

    Args:
        model: A torch module, such as a model of transformers or diffusers, on any device. It must not be quantised or
            have PEFT adapters around its layers.
        adapters: Paths, loaded adapters, or pairs of one of these and a weight (1 if none is given).
        rounding: `nearest`, `stochastic`, `adapter` or `calibrated`: how sums are rounded to the parameter's dtype.
        seed: Random seed of `stochastic` rounding. Equal seeds give equal values.
        penalty: With `adapter` and `calibrated` rounding: how much rounding errors on all other inputs count.
        moments: With `calibrated` rounding: a safetensors file with the sum of x x' over the inputs x of each module,
            (in, in), under the module's name.
        allow_partial: Leave out what does not fit the model, and list it in the report.
        include: Globs over module names; empty selects all.
        exclude: Globs of names to leave out.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree.
        from_format: The format of the adapters; detected from the content if None.
        initial: For each adapter whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), the adapter as
            it was before training, in the same order. It is subtracted.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts, if the files do
            not say.
        expert_orientation: `out-in` or `in-out`: the orientation of square fused experts, if the files do not say.
        threads: Number of workers; one per CPU if None. The result does not depend on it.

    Returns:
        The report of the merge; its `output` is None.

    Raises:
        UsageError: The model has adapters around its layers, or weights that are not in memory.
        UnsupportedError: The model is quantised, or the adapters would change its layers.
        MismatchError: A module of an adapter does not exist in the model, or a weight has a different shape.
        InputError: Values are NaN or infinite, or too large for the dtype of a parameter.

    Example:
        >>> import loratools, torch
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4, bias=False)})
        >>> before = model["q_proj"].weight.detach().clone()
        >>> adapter = loratools.Adapter.from_factors({"q_proj": (torch.ones(2, 6), torch.ones(4, 2))})
        >>> report = loratools.merge_into(model, adapter)
        >>> torch.equal(model["q_proj"].weight.detach(), before + 2)
        True
    """
    began = time.monotonic()
    options = MergeOptions(
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
    in_memory = ModelInMemory.of(model)
    base = in_memory.checkpoint()
    loaded = load_for_merge(adapters, base, options)
    selected = [(adapter.selected(include, exclude), weight) for adapter, weight in loaded]
    merged = merged_weights(base, selected, options)
    _refuse_other_shapes(merged)
    merge_plan = _plan(merged, selected, options)
    refuse_not_finite({a.name: {n: r.tensor for n, r in a.replacements.items()} for a, _ in merge_plan.active})
    computed = {output.name: _Computed.of(output) for output in merge_plan.outputs if output.touched}
    units = [
        unit
        for number, file in enumerate(merge_plan.files)
        for output in file.outputs
        if output.touched and output.copied is None
        for unit in rows_units(number, output)
    ]
    written = {output.name: Written() for output in merge_plan.outputs}
    try:
        with single_threaded_torch():
            gains = run(
                units, lambda unit: merge_blocks(unit, computed[unit.output.name].write), threads=worker_count(threads)
            )
    except InputError:
        refuse_not_finite({a.name: a.tensors() for a, _ in merge_plan.active})
        raise
    for unit, gain in zip(units, gains, strict=True):
        written[unit.output.name] += Written(gain)
    _copied(merge_plan, computed)
    in_memory.set_values({name: each.values for name, each in computed.items()}, apart=merged.untied)
    report = measured_report(merge_plan, merge_plan.out, written, verified=False)
    return replace(report, output=None, seconds=round(time.monotonic() - began, 3))


@dataclass(frozen=True, eq=False)
class _Computed:
    """The new values of a parameter, on the CPU, filled block by block."""

    values: Tensor
    memory: memoryview

    @classmethod
    def of(cls, output: Output) -> _Computed:
        import torch

        from loratools.tensors.dtypes import torch_dtype

        values = torch.empty(output.shape, dtype=torch_dtype(output.dtype))
        return cls(values, values.reshape(-1).view(torch.uint8).numpy().data)

    def write(self, start: int, data: memoryview) -> None:
        self.memory[start : start + len(data)] = data


def _plan(merged: MergedWeights, adapters: Sequence[tuple[Any, float]], options: MergeOptions) -> MergePlan:
    return MergePlan(
        base=merged.base,
        adapters=tuple(adapter for adapter, _ in adapters),
        weights=tuple(weight for _, weight in adapters),
        matches=merged.matches,
        files=(OutputFile("", {}, tuple(merged.outputs.values())),),
        side_files=(),
        added=merged.added,
        warnings=tuple(dict.fromkeys([*merged.warnings, *merged.rounding_warnings])),
        out=merged.base.path,
        rounding=options.rounding,
        options=options,
    )


def _refuse_other_shapes(merged: MergedWeights) -> None:
    """Refuse layers, weights and rows that the model in memory does not have."""
    if merged.deeper is not None:
        raise UnsupportedError(
            "an adapter repeats layers of its base, and the number of layers of a model in memory cannot change",
            hint="merge into the files of the base: loratools.merge(base, adapters, out)",
        )
    if merged.added:
        raise MismatchError(
            f"{len(merged.added)} weights of the adapters do not exist in the model",
            details=list(merged.added),
            hint="load the model with them, for example the class with that head; or leave them out with exclude; "
            "or merge into the files of the base",
        )
    weights = merged.base.weights
    resized = [
        f"{name}   {tuple(weights[name].shape)} becomes {output.shape}"
        for name, output in merged.outputs.items()
        if name in weights and tuple(weights[name].shape) != tuple(output.shape)
    ]
    if resized:
        raise MismatchError(
            f"{len(resized)} weights would have another shape",
            details=resized,
            hint="resize the model first, with model.resize_token_embeddings(N) for a larger vocabulary",
        )


def _copied(merge_plan: MergePlan, computed: Mapping[str, _Computed]) -> None:
    """Store replaced weights, of which no rows are computed."""
    for output in merge_plan.outputs:
        if output.touched and output.copied is not None:
            computed[output.name].values.copy_(output.values.read())
