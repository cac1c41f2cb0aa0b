"""Mochi 1: the authors' names, with fused projections, and those of diffusers.

The text's stream is half as wide as the video's, and both are as wide inside of the attention. In diffusers the first
layers of the feed-forward networks have the gate before what it gates.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule
from loratools.naming.image.parts.double_blocks import ADDED, QKV


def _rules() -> Iterator[Rule]:
    block, target = "blocks.{}", "transformer_blocks.{}"
    for stream, leaves, out, ratio in (("x", QKV, "to_out.0", 1), ("y", ADDED, "to_add_out", 2)):
        attention = tuple(f"{target}.attn1.{leaf}" for leaf in leaves)
        yield Rule(f"{block}.attn.qkv_{stream}", attention, split="thirds", ratio=3 * ratio)
        yield Rule(f"{block}.attn.proj_{stream}", (f"{target}.attn1.{out}",), ratio=1 / ratio)
        for q in ("q", "k"):
            norm = f"norm_{q}" if stream == "x" else f"norm_added_{q}"
            yield Rule(f"{block}.attn.{q}_norm_{stream}", (f"{target}.attn1.{norm}",))
    for a, b in {"x": "ff", "y": "ff_context"}.items():
        yield Rule(f"{block}.mlp_{a}.w1", (f"{target}.{b}.net.0.proj",), gated=True)
        yield Rule(f"{block}.mlp_{a}.w2", (f"{target}.{b}.net.2",))
    yield Rule(f"{block}.mod_x", (f"{target}.norm1.linear",), ratio=4)
    # The last block does nothing more with the text than to scale it.
    yield Rule("blocks.47.mod_y", ("transformer_blocks.47.norm1_context.linear_1",))
    yield Rule(f"{block}.mod_y", (f"{target}.norm1_context.linear",), ratio=2)
    outside = {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
        "t5_y_embedder.to_q": "time_embed.pooler.to_q",
        "t5_y_embedder.to_out": "time_embed.pooler.to_out",
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.linear": "proj_out",
    }
    yield from (Rule(a, (b,)) for a, b in outside.items())
    yield Rule("final_layer.mod", ("norm_out.linear",), swap=True)


FAMILY = Family(
    "mochi",
    "transformer",
    {"original": tuple(_rules())},
    depths={"transformer_blocks": frozenset({48})},
    widths={
        **dict.fromkeys((*(f"attn1.{leaf}" for leaf in QKV), "{}.ff.net.0.proj"), frozenset({3072})),
        **dict.fromkeys((*(f"attn1.{leaf}" for leaf in ADDED), "ff_context.net.0.proj"), frozenset({1536})),
    },
    exclusive=(
        *(f"blocks.{{}}.attn.{leaf}_{s}" for leaf in ("qkv", "proj") for s in "xy"),
        *("blocks.{}.mlp_", "blocks.{}.mod_"),
        *(f"transformer_blocks.{{}}.attn1.{leaf}" for leaf in (*ADDED, "to_add_out")),
    ),
    classes=("MochiTransformer3DModel",),
    words=("mochi",),
)
