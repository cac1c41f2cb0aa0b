"""Sana: the authors' names, with fused projections, and those of diffusers; feed-forward layers are convolutions."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same
from loratools.naming.image.parts.cross_attention import cross_attention

_ATTENTIONS = ("attn1", "attn2")


def _rules() -> Iterator[Rule]:
    block, target = "blocks.{}", "transformer_blocks.{}"
    yield from cross_attention()
    for a, b in {"inverted_conv": "inverted", "depth_conv": "depth", "point_conv": "point"}.items():
        yield Rule(f"{block}.mlp.{a}.conv", (f"{target}.ff.conv_{b}",))
    yield Rule("x_embedder.proj", ("patch_embed.proj",))
    yield Rule("t_embedder.mlp.0", ("time_embed.emb.timestep_embedder.linear_1",))
    yield Rule("t_embedder.mlp.2", ("time_embed.emb.timestep_embedder.linear_2",))
    yield Rule("t_block.1", ("time_embed.linear",))
    yield from (Rule(f"y_embedder.y_proj.fc{i}", (f"caption_projection.linear_{i}",)) for i in (1, 2))
    yield Rule("attention_y_norm", ("caption_norm",))
    yield Rule("final_layer.linear", ("proj_out",))
    # Sana-Sprint, which diffusers alone has in this form.
    yield from same(*(f"{target}.{a}.norm_{q}" for a in _ATTENTIONS for q in ("q", "k")))
    for embedder in ("guidance", "timestep"):
        yield from same(*(f"time_embed.{embedder}_embedder.linear_{i}" for i in (1, 2)))


FAMILY = Family(
    "sana",
    "transformer",
    {"original": tuple(_rules())},
    # 1.6B, 0.6B and 4.8B.
    depths={"transformer_blocks": frozenset({20, 28, 60})},
    widths=dict.fromkeys(
        tuple(f"{a}.{leaf}" for a in _ATTENTIONS for leaf in ("to_q", "to_k", "to_v")), frozenset({2240, 1152})
    ),
    exclusive=("blocks.{}.mlp.inverted_conv.", "blocks.{}.mlp.depth_conv.", "transformer_blocks.{}.ff.conv_"),
    classes=("SanaTransformer2DModel",),
    words=("sana",),
)
