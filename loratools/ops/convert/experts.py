"""Experts of a mixture as their format has them: a module for every expert, or one parameter that holds all.

Formats other than PEFT have a module for each; PEFT has the parameters of the model in memory (`target_parameters`),
and no place for the linear layers that Unsloth cuts these into.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.formats import Base
from loratools.naming.language.experts import (
    Expert,
    expert_name,
    gate_and_up_in_turn,
    parse_numbered,
    stored_in_out,
)
from loratools.ops.lowrank.experts import Experts, expert_target, together, zeros_like
from loratools.tensors.views import transposed
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts
from loratools.updates.parts.protocol import Update
from loratools.updates.parts.row_blocks import rows_in_turn, rows_of

_FUSED, _DOWN = "gate_up_proj", "down_proj"


def unpacked(adapter: Adapter, names: Collection[str], base: Base | None, *, to: str) -> Adapter:
    """The adapter with the fused experts among `names` taken apart for a format, where the base's sizes say how.

    Gate and up become two modules. What cannot be told apart stays as it is: square experts of which nothing says how
    they are stored; and, for all formats but GGUF, those in which gate and up stand in turn (gpt-oss).
    """
    hidden = base.whole_number("hidden_size") if base is not None else None
    if base is None or hidden is None or (stored_in_out(base.model_type) and to != "gguf"):
        return adapter
    updates: dict[str, Update] = {}
    for name, update in adapter.updates.items():
        unpacked_modules = _taken_apart(name, update, base, hidden) if name in names else None
        updates |= unpacked_modules if unpacked_modules is not None else {name: update}
    return replace(adapter, updates=updates)


def packed(adapter: Adapter, base: Base | None) -> Adapter:
    """The adapter with linear layers of single experts as the parameters that the base's class has in memory.

    Experts that the adapter has nothing for get zeros. Only for models whose experts stand in memory as they were cut
    (gpt-oss), and not for a base that is stored in such layers itself.
    """
    count = base.whole_number("num_local_experts", "num_experts") if base is not None else None
    if base is None or count is None or not gate_and_up_in_turn(base.model_type):
        return adapter
    if any(parse_numbered(name.removesuffix(".weight")) is not None for name in base.shapes):
        return adapter
    layers: dict[str, dict[int, str]] = {}
    for name, update in adapter.updates.items():
        numbered = parse_numbered(name)
        if numbered is not None and numbered[2] < count and update.as_lora() is not None and not update.needs_base:
            layers.setdefault(f"{numbered[0]}.experts.{numbered[1]}", {})[numbered[2]] = name
    updates = dict(adapter.updates)
    for fused, members in layers.items():
        if fused in updates:
            continue  # the adapter has both, and they would become one
        present = {number: updates.pop(name) for number, name in members.items()}
        first = next(iter(present.values()))
        absent = replace(zeros_like(first), alpha=first.scale)  # of rank 1, so that nothing has to be folded
        updates |= {expert_target(fused, i): present.get(i, absent) for i in range(count)}
        updates = together(updates, {fused: Experts(count, "in-out")})
    return replace(adapter, updates=updates) if layers else adapter


def _taken_apart(name: str, update: Update, base: Base, hidden: int) -> dict[str, LoRA] | None:
    """The modules of single experts that an update is of; None if it stays as it is."""
    in_turn = gate_and_up_in_turn(base.model_type)
    parent, _, leaf = name.rpartition(".experts.")
    experts, lora, numbered = update.as_experts(), update.as_lora(), parse_numbered(name)
    if experts is not None and parent and leaf in (_FUSED, _DOWN):
        return _modules(_parent(parent, base), leaf, experts, hidden, base.model_type)
    if numbered is not None and lora is not None and lora.magnitude is None and in_turn:
        return _of_expert(numbered[0], numbered[2], numbered[1], lora, in_turn=True)
    return None


def _parent(parent: str, base: Base) -> str:
    # transformers 5 calls the mixture of Mixtral `mlp`; adapters and checkpoints of single experts do not.
    if base.model_type == "mixtral" and parent.endswith(".mlp"):
        return f"{parent.removesuffix('.mlp')}.block_sparse_moe"
    return parent


def _modules(
    parent: str, leaf: str, update: LoRAExperts, hidden: int, model_type: str | None
) -> dict[str, LoRA] | None:
    # Where PEFT took the two axes the other way round, the product of an expert is the transposed change.
    swapped = _is_swapped(leaf, update, hidden, in_out=stored_in_out(model_type))
    if swapped is None:
        return None
    modules: dict[str, LoRA] = {}
    for e in range(update.experts):
        expert = update.expert(e)
        if swapped:
            expert = replace(expert, a=transposed(expert.b), b=transposed(expert.a))
        modules |= _of_expert(parent, e, leaf, expert, in_turn=gate_and_up_in_turn(model_type))
    return modules


def _of_expert(parent: str, number: int, leaf: str, expert: LoRA, *, in_turn: bool) -> dict[str, LoRA]:
    """The modules of one expert, of an update (out, in) of its down projection, or of gate and up together."""
    if leaf == _DOWN:
        return {expert_name(Expert(parent, number, _DOWN)): expert}
    half = expert.shape[0] // 2
    gate, up = (
        (rows_in_turn(expert, 0, 2), rows_in_turn(expert, 1, 2))
        if in_turn
        else (rows_of(expert, 0, half), rows_of(expert, half, 2 * half))
    )
    return {
        expert_name(Expert(parent, number, "gate_proj")): gate,
        expert_name(Expert(parent, number, "up_proj")): up,
    }


def _is_swapped(leaf: str, update: LoRAExperts, hidden: int, *, in_out: bool) -> bool | None:
    """Whether inputs and outputs are exchanged: by the width of the model, or, of square ones, by who trained them.

    None if neither tells. in_out: whether the layers of the model keep (in, out), which `module` leaves it to.
    """
    _, out, into = update.shape
    if (out == hidden) != (into == hidden):
        return (into == hidden) != (leaf == _FUSED)
    if hidden != out or update.orientation is None:
        return None
    trained_in_out = {"in-out": True, "out-in": False, "module": in_out, "inverted": not in_out}[update.orientation]
    return trained_in_out != in_out
