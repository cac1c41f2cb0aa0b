"""The report of a merge from its plan and from what was measured while it was written, with its warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.ops.merge.journal import Written
from loratools.ops.merge.outputs import Output, Requantised
from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.report import MergedTensor, MergeReport, RequantizedTensor
from loratools.ops.merge.rows import Gain
from loratools.ops.merge.trained_on import declared_training, size_of_difference

# If less than this share of an update survives on a coarser grid, the warning includes a remedy.
_LOW_GAIN = 0.9
# Names in one warning.
_NAMED = 5


def planned_report(plan: MergePlan) -> MergeReport:
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
        left_out=tuple(leftover.name for leftover in plan.leftovers),
        warnings=plan.warnings,
        rounding=plan.rounding,
        trained_on=str(plan.trained_on) if plan.trained_on is not None else None,
        plan=plan,
    )


def measured_report(plan: MergePlan, out: Path, written: Mapping[str, Written], verified: bool) -> MergeReport:
    changed = [o for o in plan.outputs if o.touched]
    written = {o.merged.name: written[o.name] for o in changed}
    touched = [o.merged for o in changed]
    updated = [o for o in touched if o.updates]
    total = sum((written[o.name].gain for o in updated), Gain())
    on_grid = {r.output.name for r in plan.requantized}
    plain = sum((written[o.name].gain for o in updated if o.name not in on_grid), Gain())
    tensors = []
    for o in touched:
        changed_by = {u.adapter for u in o.updates} | ({o.replaced_by} if o.replaced_by is not None else set())
        measured = written[o.name]
        ratio = measured.ratio if verified else None
        tensors.append(
            MergedTensor(o.name, tuple(sorted(changed_by)), measured.gain.gain if o.updates else None, ratio)
        )
    warnings = list(plan.warnings)
    if updated and total.energy == 0:
        warnings.append(
            f"every delta is zero, of {len(updated)} of {len(updated)} weights: the adapters are untrained, and the "
            "result equals the base"
        )
    elif updated and total.unchanged_share == 1 and not plan.requantized:
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
    requantized = tuple(_requantized(r, written[r.output.name].gain) for r in plan.requantized)
    packed = sum((written[t.name].gain for t in requantized), Gain())
    if packed.gain is not None and packed.gain < _LOW_GAIN:
        keeps_more = "" if any(o.rounding.feeds_back for o in updated) else "--rounding adapter keeps more of it, and "
        warnings.append(
            f"{1 - packed.gain:.1%} of the update is lost in {len(requantized)} weights that are quantised again, "
            f"being small against the steps of their grid; {keeps_more}--dequantize keeps it"
        )
    warnings += _training_warnings(plan, updated)
    undirected = [o.name for o in updated if written[o.name].gain.undirected]
    if undirected:
        warnings.append(
            f"{len(undirected)} merged weights are rounded to nearest, since their updates have no factors that tell "
            f"which inputs they read: {', '.join(undirected[:_NAMED])}{', ...' if len(undirected) > _NAMED else ''}"
        )
    return MergeReport(
        output=out,
        adapters=tuple((a.name, w) for a, w in zip(plan.adapters, plan.weights, strict=True)),
        tensors=tuple(tensors),
        merged_weights=len(updated),
        untouched=len(plan.outputs) - len(touched),
        replaced=len([o for o in touched if o.replaced_by is not None and o.name not in plan.added]),
        added=plan.added,
        dequantized=plan.dequantized,
        bytes=plan.bytes_written,
        seconds=0.0,
        gain=total.gain,
        unchanged_share=total.unchanged_share,
        max_error_ratio=max((t.max_error_ratio or 0.0 for t in tensors), default=None) if verified else None,
        verified=verified,
        left_out=tuple(leftover.name for leftover in plan.leftovers),
        warnings=tuple(warnings),
        rounding=plan.rounding,
        trained_on=str(plan.trained_on) if plan.trained_on is not None else None,
        requantized=requantized,
    )


def _training_warnings(plan: MergePlan, updated: Sequence[Output]) -> list[str]:
    """How far the values that training saw are from the base's, where they are taken, or where they should be."""
    if plan.trained_on is not None:
        size = size_of_difference(updated, plan.trained_on)
        if not size:
            return []
        return [
            f"the adapters are added to the base's weights as {plan.trained_on} stores them; these differ from "
            f"the base by {size:.2g} times the update"
        ]
    if plan.base.quantisation is not None or plan.dequantized:
        return []
    warnings = []
    for i, (adapter, weight) in enumerate(zip(plan.adapters, plan.weights, strict=True)):
        scheme = declared_training(adapter) if weight else None
        if scheme is None:
            continue
        size = size_of_difference([o for o in updated if any(u.adapter == i for u in o.updates)], scheme)
        difference = f", from which the base differs by {size:.2g} times the update" if size is not None else ""
        warnings.append(
            f"'{adapter.name}' was trained on this model quantised ({scheme}){difference}; --trained-on "
            f"{scheme.codes if not scheme.nested else 'FILE'} merges into the values that training saw"
        )
    return warnings


def _requantized(requantised: Requantised, gain: Gain) -> RequantizedTensor:
    def share(square: float) -> float | None:
        return math.sqrt(square / gain.energy) if gain.energy > 0 else None

    return RequantizedTensor(
        requantised.output.name, requantised.scheme, share(gain.float_error), share(gain.stored_error), gain.gain
    )
