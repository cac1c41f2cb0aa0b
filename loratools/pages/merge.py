"""Adapters in the weights of their base."""

from __future__ import annotations

from typing import cast

from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.report import MergeReport
from loratools.pages.parts.contents import Contents, Remark, table, tables, warnings
from loratools.report.fields import Field, integer, text_field
from loratools.report.merge import merge_facts, plan_facts
from loratools.report.text import number, plural, size

_TENSORS = (
    text_field("name", "weight"),
    text_field("adapters", "adapters"),
    Field("gain", "gain", "{:.4%}".format),
    Field("max_error_ratio", "largest error, of what one rounding may cost", "{:.3f}".format),
)
_REQUANTIZED = (
    text_field("name", "weight"),
    text_field("scheme"),
    Field("error_before", "error as floats, of the update"),
    Field("error_after", "error as stored, of the update"),
    Field("gain", "gain", "{:.2%}".format),
)
_MATCHES = (
    text_field("target", "module"),
    text_field("adapter"),
    text_field("weight", "weight of the base"),
    text_field("part"),
    Field("rank", "rank", str),
    Field("scale", "scale"),
)
_FILES = (text_field("name", "file"), Field("tensors", "tensors", integer), Field("bytes", "size", size))
_NAMES = (text_field("name"),)


def contents(report: MergeReport | MergePlan) -> Contents:
    """Return what the page of a merge, or of its plan, shows."""
    if isinstance(report, MergePlan):
        return _of_plan(report)
    if report.plan is not None:
        return _of_plan(report.plan)
    names = [f"{i + 1} {path}" for i, (path, _) in enumerate(report.adapters)]
    weights = [weight for _, weight in report.adapters]
    facts = [("adapter", f"{name}, weight {number(weight)}") for name, weight in zip(names, weights, strict=True)]
    changed = [
        {**row, "adapters": [names[i] for i in tensor.adapters]}
        for row, tensor in zip(report.rows(), report.tensors, strict=True)
    ]
    return Contents(
        title=f"Model merged to {report.output}",
        facts=(*facts, *merge_facts(report)),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Changed weights", _TENSORS, changed),
            table("Weights that were quantised again", _REQUANTIZED, [vars(each) for each in report.requantized]),
            table("New weights", _NAMES, [{"name": name} for name in report.added]),
            table("Left out of the merge", _NAMES, [{"name": name} for name in report.left_out]),
        ),
    )


def _of_plan(plan: MergePlan) -> Contents:
    document = cast("dict[str, list[dict[str, object]]]", plan.to_dict()["plan"])
    names = [f"{i + 1} {adapter.name}" for i, adapter in enumerate(plan.adapters)]
    matches = [{**match, "adapter": names[cast("int", match["adapter"])]} for match in document["matches"]]
    leftovers = tuple(Remark("error", f"has no place in the base: {leftover}") for leftover in plan.leftovers)
    return Contents(
        title=f"Plan: {plural(len(plan.adapters), 'adapter')} merged into {plan.base.path.name}",
        facts=tuple(plan_facts(plan, plan.out)),
        remarks=(*leftovers, *warnings(plan.warnings)),
        tables=tables(
            table("Where the modules of the adapters go", _MATCHES, matches),
            table("Files with weights", _FILES, document["files"]),
        ),
    )
