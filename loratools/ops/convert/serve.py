"""An adapter as inference servers load it: one rank, one plain alpha, no patterns, no rsLoRA, no whole weights.

vLLM and SGLang multiply every module with the config's alpha / r, and read neither rank_pattern nor alpha_pattern
(vLLM's PEFTHelper, SGLang's LoRAAdapter); SGLang does not read use_rslora either, and takes no error for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.formats.common.notes import record_notes
from loratools.formats.common.scale import uniform
from loratools.formats.common.source import counted


@dataclass(frozen=True)
class Server:
    """A server for adapters, and what it takes.

    Attributes:
        largest: The largest rank that it can be told to take.
        usual: The largest rank that it takes without being told.
        option: How to tell it.
        single_experts: Whether it loads factors of single experts of a mixture, as files had them before transformers 5
            (`experts.7.gate_proj`).
    """

    largest: int | None = None
    usual: int | None = None
    option: str = ""
    single_experts: bool = False


SERVERS: dict[str, Server] = {
    "lorax": Server(),
    "sglang": Server(single_experts=True),
    "tensorrt-llm": Server(usual=64, option="--max_lora_rank"),
    "tgi": Server(),
    "vllm": Server(largest=512, usual=16, option="--max-lora-rank", single_experts=True),
}


def server(name: str) -> Server:
    """The server of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in SERVERS:
        raise UsageError(f"no server named '{name}'; there are: {', '.join(SERVERS)}")
    return SERVERS[name]


def taken_apart_for(adapter: Adapter, name: str) -> list[str]:
    """Names of fused experts which the server loads one by one."""
    if not server(name).single_experts:
        return []
    return [target for target, update in adapter.updates.items() if update.as_experts() is not None]


def unservable(adapter: Adapter, name: str) -> dict[str, str]:
    """What the server does not load, and why."""
    largest = server(name).largest
    reasons = dict.fromkeys(adapter.replacements, f"{name} loads factors and no whole weights")
    for target, update in adapter.updates.items():
        lora = update.as_lora()
        if lora is None and update.as_experts() is not None and server(name).single_experts:
            reasons[target] = f"{name} loads experts one by one, and what tells them apart is missing: give --base BASE"
        elif lora is None:
            reasons[target] = f"{name} loads no {update.kind}"
        elif set(lora.parts) != {"A", "B"} or len(lora.a.shape) != 2:
            reasons[target] = f"{name} loads no LoRA with {', '.join(sorted(update.parts))} of this shape"
        elif largest is not None and lora.rank > largest:
            reasons[target] = f"rank {lora.rank}, and {name} takes {largest} at most: resize it first"
    return reasons


def served(adapter: Adapter, name: str, dtype: str | None) -> tuple[Adapter, list[str]]:
    """The adapter as the server loads it, with equal deltas, and what a person should know."""
    updates = {n: lora for n, u in adapter.updates.items() if (lora := u.as_lora()) is not None and lora.rank > 0}
    if not updates:
        return adapter, []
    same, rank, scale = uniform(updates, dtype)
    warnings = []
    if padded := sum(u.rank != rank for u in updates.values()):
        warnings.append(f"{counted(padded, 'module')} filled up with zeros to rank {rank}: {name} has one for all")
    if folded := sum(u.scale != scale for u in updates.values()):
        warnings.append(f"the scale of {counted(folded, 'module')} is folded into B: {name} has one for all")
    server_limits = server(name)
    if server_limits.usual is not None and rank > server_limits.usual:
        warnings.append(
            f"{name} takes rank {server_limits.usual} unless it is told otherwise: {server_limits.option} {rank}"
        )
    # What a server would apply to the base besides factors, or refuse, stays out of the config. Modules are listed by
    # the last part of their names, which is what servers look at; a longer name is no error, and not understood.
    fields = {"target_modules": sorted({n.rpartition(".")[2] for n in same}), "bias": "none"}
    notes = record_notes(adapter, same, fields)
    return replace(adapter, updates=same, fan_in_fan_out=None, layer_replication=(), notes=notes), warnings
