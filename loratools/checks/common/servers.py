"""What inference servers load of an adapter: what `convert --serve` writes, and what `check --for` tells.

vLLM and SGLang multiply every module with the config's alpha / r, and read neither rank_pattern nor alpha_pattern
(vLLM's PEFTHelper, SGLang's LoRAAdapter); SGLang does not read use_rslora either, and takes no error for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.naming.language.experts import gate_and_up_in_turn


@dataclass(frozen=True)
class Server:
    """A server for adapters, and what it takes.

    Attributes:
        largest: The largest rank that it can be configured for.
        usual: The largest rank that it takes without being told.
        option: How to tell it.
        reads_rslora: Whether it divides by the square root of the rank where the config says rsLoRA.
        own_ranks: Whether it divides by the rank of each module, and not by the config's.
        single_experts: Whether it loads factors of single experts of a mixture, as files had them before transformers 5
            (`experts.7.gate_proj`).
        fused_experts: The `model_type` of models of whose mixtures it loads PEFT's fused experts, and no single ones.
    """

    largest: int | None = None
    usual: int | None = None
    option: str = ""
    reads_rslora: bool = True
    own_ranks: bool = False
    single_experts: bool = False
    fused_experts: frozenset[str] = frozenset()


SERVERS: dict[str, Server] = {
    "lorax": Server(),
    "sglang": Server(reads_rslora=False, single_experts=True),
    "tensorrt-llm": Server(usual=64, option="--max_lora_rank", own_ranks=True),
    "tgi": Server(),
    "vllm": Server(
        largest=512,
        usual=16,
        option="--max-lora-rank",
        single_experts=True,
        # The models that say `is_3d_moe_weight`.
        fused_experts=frozenset({"gpt_oss", "qwen3_vl_moe", "qwen3_5_moe"}),
    ),
}


def server(name: str) -> Server:
    """The server of this name.

    Raises:
        UsageError: There is none.
    """
    if name not in SERVERS:
        raise UsageError(f"no server named '{name}'; there are: {', '.join(SERVERS)}")
    return SERVERS[name]


def taken_apart_for(adapter: Adapter, name: str, model_type: str | None) -> list[str]:
    """Names of fused experts which the server loads one by one, of a model of this type."""
    if not server(name).single_experts or model_type in server(name).fused_experts:
        return []
    return [target for target, update in adapter.updates.items() if update.as_experts() is not None]


def unservable(adapter: Adapter, name: str, model_type: str | None) -> dict[str, str]:
    """What the server does not load, and why; `model_type` is that of the base, where one is given."""
    largest, fused = server(name).largest, model_type in server(name).fused_experts
    reasons = dict.fromkeys(adapter.replacements, f"{name} loads factors and no whole weights")
    for target, update in adapter.updates.items():
        lora, experts = update.as_lora(), update.as_experts()
        if experts is not None and fused:
            other = _other_parameter(target)
            if other is not None and other not in adapter.updates:
                reasons[target] = f"{name} loads fused experts where both parameters have factors, and {other} has none"
        elif experts is not None and server(name).single_experts and gate_and_up_in_turn(model_type):
            reasons[target] = f"{name} loads experts one by one, in which gate and up do not stand in turn"
        elif experts is not None and server(name).single_experts:
            reasons[target] = f"{name} loads experts one by one, and what tells them apart is missing: give --base BASE"
        elif lora is None:
            reasons[target] = f"{name} loads no {update.kind}"
        elif set(lora.parts) != {"A", "B"} or len(lora.a.shape) != 2:
            reasons[target] = f"{name} loads no LoRA with {', '.join(sorted(update.parts))} of this shape"
        rank = update.rank
        if largest is not None and rank is not None and rank > largest:
            reasons.setdefault(target, f"rank {rank}, and {name} takes {largest} at most: resize it first")
    return reasons


def _other_parameter(target: str) -> str | None:
    """The second of the two parameters that hold the experts of a mixture."""
    parent, _, leaf = target.rpartition(".")
    other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}.get(leaf)
    return None if other is None else f"{parent}.{other}"


def served_scale(name: str, *, alpha: float, rank: int, rslora: bool) -> float:
    """What the server multiplies a module with.

    Args:
        name: The server.
        alpha: The alpha of the config, the only one that servers read.
        rank: The rank that the server divides by.
        rslora: Whether the config says rsLoRA.
    """
    return alpha / (rank**0.5 if rslora and server(name).reads_rslora else rank)
