"""The model card of a merged model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from loratools.ops.card.command import command_line, weighted
from loratools.ops.card.inputs import CARD, card_input
from loratools.ops.card.model_card import ModelCard, base_names, card_of_person
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outputs import PlannedFile
from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.report import MergeReport

# The library that loads a model of this layout.
_LIBRARIES = {"huggingface": "transformers", "diffusers": "diffusers", "mlx": "mlx"}


def with_card(plan: MergePlan, out: Path) -> MergePlan:
    """Return the plan with a card among its files, in place of the base's, which is the card of another model.

    A card that a person has written into the output stays, and no other is planned.
    """
    if plan.one_file or card_of_person(out):
        return plan
    others = [file for file in plan.side_files if file.name != CARD]
    return replace(plan, side_files=tuple(sorted([*others, PlannedFile(CARD, text="")], key=lambda file: file.name)))


def card_written(plan: MergePlan, report: MergeReport, *, function: Callable[..., object]) -> MergePlan:
    """Return the plan with the text of its card, if it has one, from what was measured.

    Args:
        plan: The plan of the merge.
        report: What was measured.
        function: The function of the verb, whose signature has the defaults of its options.
    """
    files = [
        replace(file, text=merge_card(plan, report, function=function).text())
        if file.name == CARD and file.text == ""
        else file
        for file in plan.side_files
    ]
    return replace(plan, side_files=tuple(files))


def merge_card(plan: MergePlan, report: MergeReport, *, function: Callable[..., object]) -> ModelCard:
    """Return the card of what was merged, from the plan and from what was measured."""
    named = next((adapter.base_model for adapter, _ in plan.active if adapter.base_model), None)
    base = card_input(plan.base.path)
    adapters = [card_input(adapter.path) for adapter, _ in plan.active]
    spelled = [weighted(source.name, weight) for source, (_, weight) in zip(adapters, plan.active, strict=True)]
    settings = {field.name: getattr(plan.options, field.name) for field in fields(MergeOptions)}
    bases = base_names(named, plan.base.path)
    return ModelCard(
        title=f"{base.name} with {', '.join(source.name for source in adapters)}",
        base_models=(*bases, *(source.name for source in adapters if "/" in source.name)),
        relation="merge",
        library=_LIBRARIES.get(plan.base.layout),
        tags=("merge", "lora"),
        inputs=(base, *adapters),
        command=command_line("merge", [base.name, *spelled], settings, function=function),
        facts=tuple(_facts(report)),
        warnings=report.warnings,
    )


def _facts(report: MergeReport) -> list[tuple[str, str]]:
    facts = [("merged weights", f"{report.merged_weights:,}"), ("copied as they are", f"{report.untouched:,}")]
    facts += [("replaced weights", f"{report.replaced:,}")] if report.replaced else []
    if report.gain is not None:
        facts.append(("gain: share of the adapters' change that is in the weights", f"{report.gain:.4%}"))
    if report.unchanged_share is not None:
        facts.append(("weights that moved too little to change", f"{report.unchanged_share:.2%}"))
    if report.max_error_ratio is not None:
        facts.append(("largest sampled error, of what one rounding may cost", f"{report.max_error_ratio:.3f}"))
    if errors := [each.error_after for each in report.requantized if each.error_after is not None]:
        scheme = ", ".join(sorted({each.scheme for each in report.requantized}))
        median = sorted(errors)[len(errors) // 2]
        facts.append((f"quantised again ({scheme}): median error, of the update", f"{median:.3g}"))
    facts += [("left out", ", ".join(report.left_out))] if report.left_out else []
    return [*facts, ("rounding", report.rounding)]
