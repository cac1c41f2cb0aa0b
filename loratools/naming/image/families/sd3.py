"""Stable Diffusion 3 and 3.5: joint blocks of Stability's MMDiT and those of diffusers.

Esser et al., 2024, https://arxiv.org/abs/2403.03206. The last block's context has only a shift and a scale, and there
diffusers has them in the other order, as at the end of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule


def _rules() -> Iterator[Rule]:
    target = "transformer_blocks.{}"
    x, context = "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
    qkv, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    yield Rule(f"{x}.attn.qkv", tuple(f"{target}.attn.{leaf}" for leaf in qkv), split="thirds", ratio=3)
    yield Rule(f"{x}.attn2.qkv", tuple(f"{target}.attn2.{leaf}" for leaf in qkv), split="thirds", ratio=3)
    yield Rule(f"{context}.attn.qkv", tuple(f"{target}.attn.{leaf}" for leaf in added), split="thirds", ratio=3)
    names = {
        f"{x}.attn.proj": "attn.to_out.0",
        f"{x}.attn2.proj": "attn2.to_out.0",
        f"{context}.attn.proj": "attn.to_add_out",
        f"{x}.attn.ln_q": "attn.norm_q",
        f"{x}.attn.ln_k": "attn.norm_k",
        f"{x}.attn2.ln_q": "attn2.norm_q",
        f"{x}.attn2.ln_k": "attn2.norm_k",
        f"{context}.attn.ln_q": "attn.norm_added_q",
        f"{context}.attn.ln_k": "attn.norm_added_k",
        f"{x}.mlp.fc1": "ff.net.0.proj",
        f"{x}.mlp.fc2": "ff.net.2",
        f"{context}.mlp.fc1": "ff_context.net.0.proj",
        f"{context}.mlp.fc2": "ff_context.net.2",
        f"{x}.adaLN_modulation.1": "norm1.linear",
    }
    for a, b in names.items():
        yield Rule(a, (f"{target}.{b}",))
    yield Rule(f"{context}.adaLN_modulation.1", (f"{target}.norm1_context.linear",), swap=True)
    outside = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    for a, b in outside.items():
        yield Rule(a, (b,))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)


_LEAVES = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_BLOCK = (*(f"attn.{leaf}" for leaf in _LEAVES), "ff.net.0.proj", "ff_context.net.0.proj")

FAMILY = Family(
    "sd3",
    "transformer",
    {"original": tuple(_rules())},
    # 3 medium and 3.5 medium, 3.5 large.
    depths={"transformer_blocks": frozenset({24, 38})},
    widths=dict.fromkeys(_BLOCK, frozenset({1536, 2432})),
    exclusive=("joint_blocks.",),
    classes=("SD3Transformer2DModel",),
    words=("sd3", "stable-diffusion-3", "stable-diffusion-v3"),
)
