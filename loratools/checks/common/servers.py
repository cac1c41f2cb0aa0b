"""What inference servers load of an adapter: what `convert --serve` writes, and what `check --for` tells.

vLLM and SGLang multiply every module with the config's alpha / r, and read neither rank_pattern nor alpha_pattern
(vLLM's PEFTHelper, SGLang's LoRAAdapter); SGLang does not read use_rslora either, and takes no error for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.errors import UsageError


@dataclass(frozen=True)
class Server:
    """A server for adapters, and what it takes.

    Attributes:
        largest: The largest rank that it can be told to take.
        usual: The largest rank that it takes without being told.
        option: How to tell it.
        reads_rslora: Whether it divides by the square root of the rank where the config says rsLoRA.
        own_ranks: Whether it divides by the rank of each module, and not by the config's.
        single_experts: Whether it loads factors of single experts of a mixture, as files had them before transformers 5
            (`experts.7.gate_proj`).
    """

    largest: int | None = None
    usual: int | None = None
    option: str = ""
    reads_rslora: bool = True
    own_ranks: bool = False
    single_experts: bool = False


SERVERS: dict[str, Server] = {
    "lorax": Server(),
    "sglang": Server(reads_rslora=False, single_experts=True),
    "tensorrt-llm": Server(usual=64, option="--max_lora_rank", own_ranks=True),
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


def served_scale(name: str, *, alpha: float, rank: int, rslora: bool) -> float:
    """What the server multiplies a module with.

    Args:
        name: The server.
        alpha: The alpha of the config, the only one that servers read.
        rank: The rank that the server divides by.
        rslora: Whether the config says rsLoRA.
    """
    return alpha / (rank**0.5 if rslora and server(name).reads_rslora else rank)
