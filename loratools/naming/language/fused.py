"""Projections of language models that some models keep apart and others in one weight, one below the other.

Only fusions whose rows are whole parts in a row are here. Where heads or groups alternate (GPT-NeoX, BLOOM, Falcon,
InternLM2) a part is no range of rows.
"""

from __future__ import annotations

from collections.abc import Iterable

# The end of the fused module's name, and of its parts' names, in the order of their rows.
FUSIONS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # Phi-3, Phi-4
    "self_attn.W_pack": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # Baichuan
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),  # Phi-3, Phi-4, GLM-4
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),  # Segment Anything, whose queries and values SAMed trains apart
    # Qwen3.5, whose parts Tinker trains one by one.
    "linear_attn.in_proj_qkv": ("linear_attn.in_proj_q", "linear_attn.in_proj_k", "linear_attn.in_proj_v"),
}
_LAST_SEGMENTS = tuple(fused.rpartition(".")[2] for fused in FUSIONS)


def parts_of(module: str) -> tuple[str, ...]:
    """The names of the parts of a fused module, in the order of their rows; none where it is no such module."""
    if not module.endswith(_LAST_SEGMENTS):
        return ()
    for fused, parts in FUSIONS.items():
        if module == fused or module.endswith(f".{fused}"):
            return tuple(module.removesuffix(fused) + part for part in parts)
    return ()


def fused_of(module: str) -> tuple[str, ...]:
    """The fused modules that a module may be a part of."""
    fused_names = []
    for fused, parts in FUSIONS.items():
        fused_names += [module.removesuffix(p) + fused for p in parts if module == p or module.endswith(f".{p}")]
    return tuple(fused_names)


class Modules:
    """The modules of a base, found under their names or the ends of them, as an adapter may leave a prefix out."""

    def __init__(self, weights: Iterable[str]) -> None:
        self._full: dict[str, list[str]] = {}
        for weight in weights:
            module, _, leaf = weight.rpartition(".")
            segments = module.split(".")
            if leaf == "weight":
                for at in range(len(segments)):
                    self._full.setdefault(".".join(segments[at:]), []).append(module)

    def find(self, module: str) -> str | None:
        """The one module of the base that is called so, or whose name ends so; None for none, or several."""
        same_ending = self._full.get(module, [])
        return module if module in same_ending else same_ending[0] if len(same_ending) == 1 else None
