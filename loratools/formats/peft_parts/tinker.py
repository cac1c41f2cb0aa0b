"""Adapters of Tinker, whose modules have names of its own, as PEFT names them.

model.unembed_tokens                      the head: lm_head
mlp.experts.w1, w3, w2                    gate, up and down of all experts, A: (experts, rank, in), B: (experts, out,
                                          rank); a factor that all experts share is there once, as (1, ...)
linear_attn.in_proj_q, in_proj_k, in_proj_v   rows of `in_proj_qkv` (`naming/language/fused.py`)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loratools.errors import FormatError
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.formats.common.stacked_experts import items
from loratools.formats.peft_parts.keys import PREFIX
from loratools.naming.language.experts import Expert, expert_name, role_of
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor

_HEAD = re.compile(r"(?:.+\.)?unembed_tokens")
_STACK = re.compile(r"(?P<parent>.+)\.experts\.(?P<leaf>w1|w2|w3|gate_proj|up_proj|down_proj)")
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.weight")


def with_names_of_peft(source: AdapterSource) -> tuple[AdapterSource, list[str]]:
    """The source with the names and shapes that PEFT gives such modules, and warnings of what was renamed.

    Raises:
        FormatError: Factors that are of different numbers of experts, or of different ranks.
    """
    axes = {len(tensor.shape) for tensor in source.tensors.values()}
    if 3 not in axes and "unembed_tokens" not in "\n".join(source.tensors):
        return source, []
    tensors: dict[str, LazyTensor] = {}
    stacks: dict[str, dict[str, LazyTensor]] = {}
    heads = 0
    for key, tensor in source.tensors.items():
        name = key.removeprefix(PREFIX)
        stacked = len(tensor.shape) == 3 and ".experts." in name
        parsed = _FACTOR.fullmatch(name) if stacked or "unembed_tokens" in name else None
        if parsed is not None and _HEAD.fullmatch(parsed["module"]):
            tensors[f"{PREFIX}lm_head.{parsed['part']}.weight"] = tensor
            heads += 1
        elif parsed is not None and stacked and _STACK.fullmatch(parsed["module"]):
            stacks.setdefault(parsed["module"], {})[parsed["part"]] = tensor
        else:
            tensors[key] = tensor
    if not heads and not stacks:
        return source, []
    tensors |= _apart(source, stacks)
    warnings = ["the head is called unembed_tokens, and read as lm_head"] if heads else []
    if stacks:
        warnings.append(
            f"factors of all experts in {counted(len(stacks), 'module')} are read as those of single experts"
        )
    return replace(source, tensors=tensors), warnings


def _apart(source: AdapterSource, stacks: Mapping[str, Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The factors of each expert under its own name; one that all share is in each of them."""
    tensors: dict[str, LazyTensor] = {}
    faults: list[str] = []
    for module, parts in stacks.items():
        if missing := {"lora_A", "lora_B"} - parts.keys():
            faults.append(f"{quoted(module)} has no {missing.pop()}")
            continue
        a, b = parts["lora_A"], parts["lora_B"]
        count = max(a.shape[0], b.shape[0])
        shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        if {a.shape[0], b.shape[0]} - {1, count} or 0 in a.shape + b.shape:
            faults.append(f"{quoted(module)} has {shapes}, which are of different numbers of experts")
        elif a.shape[1] != b.shape[2]:
            faults.append(f"{quoted(module)} has {shapes}, which have different ranks")
        else:
            tensors |= _of_experts(module, items(a) * (count // a.shape[0]), items(b) * (count // b.shape[0]))
    if faults:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(faults), 'fault')} in the factors of its experts",
            details=shown(faults),
            hint="export it again, or download it again if it was cut off",
        )
    return tensors


def _of_experts(module: str, a: list[LazyTensor], b: list[LazyTensor]) -> dict[str, LazyTensor]:
    parsed = _STACK.fullmatch(module)
    assert parsed is not None, "found so before"
    role = role_of(parsed["leaf"])
    tensors: dict[str, LazyTensor] = {}
    for number, factors in enumerate(zip(a, b, strict=True)):
        name = f"{PREFIX}{expert_name(Expert(parsed['parent'], number, role))}"
        tensors |= {f"{name}.lora_{part}.weight": factor for part, factor in zip("AB", factors, strict=True)}
    return tensors
