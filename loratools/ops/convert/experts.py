"""Fused experts (PEFT's `target_parameters`) as a module for every expert, for formats that have no fused ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.formats import Base
from loratools.naming.language.experts import Expert, expert_name, stored_in_out
from loratools.tensors.views import transposed
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts
from loratools.updates.parts.protocol import Update
from loratools.updates.parts.row_blocks import rows_of

_FUSED, _DOWN = "gate_up_proj", "down_proj"


def unpacked(adapter: Adapter, names: Collection[str], base: Base | None) -> Adapter:
    """The adapter with the fused experts among `names` taken apart, where the base's sizes say how.

    Gate and up, one below the other, become two modules. What cannot be told apart stays as it is: experts of a base
    that interleaves the two, and square ones of which nothing says how they are stored.
    """
    hidden = base.whole_number("hidden_size") if base is not None else None
    if base is None or hidden is None or stored_in_out(base.model_type):
        return adapter
    updates: dict[str, Update] = {}
    for name, update in adapter.updates.items():
        parent, _, leaf = name.rpartition(".experts.")
        unpacked_modules = None
        experts = update.as_experts()
        if name in names and experts is not None and parent and leaf in (_FUSED, _DOWN):
            unpacked_modules = _modules(_parent(parent, base), leaf, experts, hidden)
        updates |= unpacked_modules if unpacked_modules is not None else {name: update}
    return replace(adapter, updates=updates)


def _parent(parent: str, base: Base) -> str:
    # transformers 5 calls the mixture of Mixtral `mlp`; adapters and checkpoints of single experts do not.
    if base.model_type == "mixtral" and parent.endswith(".mlp"):
        return f"{parent.removesuffix('.mlp')}.block_sparse_moe"
    return parent


def _modules(parent: str, leaf: str, update: LoRAExperts, hidden: int) -> dict[str, LoRA] | None:
    # Where PEFT took the two axes the other way round, the product of an expert is the transposed change.
    swapped = _is_swapped(leaf, update, hidden)
    if swapped is None:
        return None
    modules: dict[str, LoRA] = {}
    for e in range(update.experts):
        expert = update.expert(e)
        if swapped:
            expert = replace(expert, a=transposed(expert.b), b=transposed(expert.a))
        if leaf == _DOWN:
            modules[expert_name(Expert(parent, e, _DOWN))] = expert
            continue
        half = expert.shape[0] // 2
        modules[expert_name(Expert(parent, e, "gate_proj"))] = rows_of(expert, 0, half)
        modules[expert_name(Expert(parent, e, "up_proj"))] = rows_of(expert, half, 2 * half)
    return modules


def _is_swapped(leaf: str, update: LoRAExperts, hidden: int) -> bool | None:
    """Whether inputs and outputs are exchanged: by the width of the model, or, of square ones, by who trained them.

    None where neither tells. The layers of these models keep (out, in), so that `module` is the straight order.
    """
    _, out, into = update.shape
    if (out == hidden) != (into == hidden):
        return (into == hidden) != (leaf == _FUSED)
    if hidden != out or update.orientation is None:
        return None
    return update.orientation in ("in-out", "inverted")
