"""What a merge will do, and what it did, for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from pathlib import Path

from rich.console import RenderableType

from loratools.naming import gguf
from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.report import MergeReport
from loratools.report.pairs import pairs
from loratools.report.pictures.of_reports import LEAST_LOSS, maps
from loratools.report.text import number, plural, size
from loratools.storage.files import free_space
from loratools.updates.parts.protocol import Update

_SHOWN = 5
# llama.cpp's conversion needs one of these beside the weights.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def plan_table(plan: MergePlan, out: Path) -> list[RenderableType]:
    """What `--plan` prints."""
    notes = [("leftover", str(leftover)) for leftover in plan.leftovers] + [
        ("warning", warning) for warning in plan.warnings
    ]
    return [pairs([*plan_facts(plan, out), *notes])]


def plan_facts(plan: MergePlan, out: Path) -> list[tuple[str, str]]:
    """Return what a merge will do, in pairs of a word and a text."""
    base = plan.base
    dtypes = sorted({t.dtype for t in base.weights.values()})
    nbytes = sum(t.nbytes for t in base.weights.values())
    rows = [
        ("base", f"{base.name}  {'/'.join(dtypes)}  {size(nbytes)}  {plural(len(base.files), 'file')}"),
    ]
    for adapter, weight, matches in zip(plan.adapters, plan.weights, plan.matches, strict=True):
        if not weight:
            rows.append(("adapter", f"{adapter.name}  {adapter.format}  weight 0: left out"))
            continue
        total = len(adapter.updates) + len(adapter.replacements)
        fitting = total - len(matches.leftovers)
        parts = (
            [f"{adapter.name}  {adapter.format}", f"weight {weight:g}"]
            if weight != 1
            else [f"{adapter.name}  {adapter.format}"]
        )
        parts += [f"{fitting}/{total} names matched", *([f"prefix {matches.renaming}"] if matches.renaming else [])]
        parts += _scales(adapter.updates.values())
        rows.append(("adapter", "  ".join(parts)))
    touched = [o.merged for o in plan.outputs if o.touched]
    updated, replaced = sum(1 for o in touched if o.updates), sum(1 for o in touched if o.replaced_by is not None)
    rows += [
        ("will", f"change {plural(updated, 'weight')}, replace {replaced}, add {len(plan.added)}, "
                 f"copy {plan.copied} as they are"),
        ("output", f"{out}  {plural(len(plan.files), 'file')}  {size(plan.bytes_written)}"
                   + ("  with index" if plan.with_index else "")),
        ("beside", ", ".join(_side_files(plan)) or "nothing"),
        ("left out", ", ".join(f"{skipped.name} ({skipped.why})" for skipped in base.left_out[:_SHOWN]) or "nothing"),
        ("memory", f"about {size(plan.memory)} in each process"),
        ("disk", f"{size(free_space(out.parent))} free"),
    ]  # fmt: skip
    if plan.dequantized:
        dtypes = sorted({o.dtype for o in plan.outputs if o.name in set(plan.dequantized)})
        rows.insert(
            [key for key, _ in rows].index("will") + 1,
            ("dequantize", f"{plural(len(plan.dequantized), 'quantised weight')} written as {'/'.join(dtypes)}"),
        )
    if plan.requantized:
        schemes = ", ".join(sorted({r.scheme for r in plan.requantized}))
        rows.insert(
            [key for key, _ in rows].index("will") + 1,
            ("requantize", f"{plural(len(plan.requantized), 'weight')} stored as {schemes}, scales as they are"),
        )
    if plan.trained_on is not None:
        rows.insert([key for key, _ in rows].index("will"), ("trained on", f"the base as {plan.trained_on} makes it"))
    if plan.rounding != "nearest":
        rows.insert([key for key, _ in rows].index("will") + 1, ("rounding", plan.rounding))
    return rows


def _scales(updates: Iterable[Update]) -> list[str]:
    rank_scales = sorted({(u.rank, u.scale) for u in updates if u.rank is not None})
    if not rank_scales:
        return []
    ranks, scales = sorted({r for r, _ in rank_scales}), sorted({s for _, s in rank_scales})
    return [
        f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}",
        f"scale {number(scales[0])}" if len(scales) == 1 else f"scales {number(scales[0])}–{number(scales[-1])}",
    ]


def _side_files(plan: MergePlan) -> list[str]:
    names = []
    for file in plan.side_files:
        note = "written anew" if file.text is not None else "" if file.origin == "base" else "from the adapter"
        names.append(f"{file.name} ({note})" if note else file.name)
    return names


def explained(plan: MergePlan) -> list[str]:
    """The lines that `-v` prints: what was found and decided."""
    lines = []
    for adapter, weight, m in zip(plan.adapters, plan.weights, plan.matches, strict=True):
        if weight:
            matched = f"{len(m.updates)} updates and {len(m.replacements) + len(m.added)} replaced tensors placed"
            lines.append(f"'{adapter.name}': {matched}" + (f", with the prefix {m.renaming}" if m.renaming else ""))
    transposed = sum(place.transposed for m in plan.matches for places in m.updates.values() for place in places)
    lines += [f"{transposed} weights are stored as (in, out)"] if transposed else []
    lines += [f"beside the weights: {name}" for name in _side_files(plan)]
    return lines + [f"left out: {skipped.name}, {skipped.why}" for skipped in plan.base.left_out]


def gguf_step(plan: MergePlan, out: Path) -> str | None:
    """The command that makes a GGUF file of the result, for llama.cpp.

    Args:
        plan: The plan of the merge.
        out: Where its result goes.

    Returns:
        The command; None if llama.cpp's conversion does not take the result: it is no folder with a tokenizer, its
        weights are quantised, it has weights that the base has not got, or the conversion does not know such a model.
    """
    model_type = plan.base.config.get("model_type")
    known = model_type in gguf.BY_MODEL_TYPE or model_type in gguf.REFUSED
    if not known or plan.base.layout != "huggingface" or plan.one_file:
        return None
    if plan.base.quantisation is not None or plan.added:
        return None
    if not any(file.name in _TOKENIZERS for file in plan.side_files):
        return None
    return f"convert_hf_to_gguf.py {shlex.quote(str(out))} --outfile {shlex.quote(f'{out}.gguf')}"


def summary(report: MergeReport, *, next_step: str | None = None) -> list[RenderableType]:
    """Lines printed on stderr after a merge.

    Args:
        report: What was merged.
        next_step: A command that makes a GGUF file of the result; not mentioned if None.
    """
    next_row = [("next", f"for llama.cpp: {next_step}")] if next_step is not None else []
    facts = pairs([*merge_facts(report), *next_row])
    worst = min((tensor.gain for tensor in report.tensors if tensor.gain is not None), default=1.0)
    return [facts, maps(report.charts, "Gain")] if worst < 1 - LEAST_LOSS else [facts]


def merge_facts(report: MergeReport) -> list[tuple[str, str]]:
    """Return what a merge did, in pairs of a word and a text."""
    changed = f"{plural(report.merged_weights, 'weight')} merged"
    changed += f", {report.replaced} replaced" if report.replaced else ""
    changed += f", {len(report.added)} new" if report.added else ""
    unchanged = set(report.dequantized) - {tensor.name for tensor in report.tensors}
    rows = [("merged", f"{changed}, {report.untouched - len(unchanged)} copied as they are")]
    if report.dequantized:
        rows.append(("dequantized", f"{plural(len(report.dequantized), 'quantised weight')} written as floats"))
    if report.gain is not None:
        unmoved = f"{report.unchanged_share or 0:.1%} of the weights moved too little to change"
        rows.append(("gain", f"{report.gain:.4%} of the adapter's change is in the result ({unmoved})"))
    if report.requantized:
        rows.append(("requantized", _requantized(report)))
    if report.verified and report.max_error_ratio is not None:
        worst = _below(report.max_error_ratio)
        rows.append(("checked", f"every sampled weight is within one rounding of the exact result (worst {worst})"))
    elif not report.verified:
        rows.append(("checked", "no (--no-verify)"))
    if report.left_out:
        more = f" and {len(report.left_out) - _SHOWN} more" if len(report.left_out) > _SHOWN else ""
        rows.append(("left out", ", ".join(report.left_out[:_SHOWN]) + more))
    return [*rows, ("written", f"{report.output}  {size(report.bytes)}  in {report.seconds:.1f} s")]


def _requantized(report: MergeReport) -> str:
    """What quantising again cost, beside what floats would have cost."""
    before = [t.error_before for t in report.requantized if t.error_before is not None]
    after = [t.error_after for t in report.requantized if t.error_after is not None]
    schemes = ", ".join(sorted({t.scheme for t in report.requantized}))
    text = f"{plural(len(report.requantized), 'weight')} stored as {schemes}"
    if not before or not after:
        return text
    return f"{text}; error {_median(after):.3g} of the update (median), as floats {_median(before):.3g}"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _below(ratio: float) -> str:
    """Three decimals, cut off: what is below 1 is not shown as 1."""
    return f"{math.floor(ratio * 1000) / 1000:.3f}"
