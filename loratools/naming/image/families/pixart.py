"""PixArt alpha and sigma: the authors' names, with fused projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule
from loratools.naming.image.parts.cross_attention import cross_attention

_ATTENTIONS = ("attn1", "attn2")


def _rules() -> Iterator[Rule]:
    block, target = "blocks.{}", "transformer_blocks.{}"
    yield from cross_attention()
    yield from (Rule(f"{block}.attn.{q}_norm", (f"{target}.attn1.{q}_norm",)) for q in ("q", "k"))
    yield Rule(f"{block}.mlp.fc1", (f"{target}.ff.net.0.proj",), ratio=4)
    yield Rule(f"{block}.mlp.fc2", (f"{target}.ff.net.2",), ratio=1 / 4)
    yield Rule("x_embedder.proj", ("pos_embed.proj",))
    yield from (Rule(f"y_embedder.y_proj.fc{i}", (f"caption_projection.linear_{i}",)) for i in (1, 2))
    embedders = {"t_embedder": "timestep", "csize_embedder": "resolution", "ar_embedder": "aspect_ratio"}
    for a, b in embedders.items():
        yield Rule(f"{a}.mlp.0", (f"adaln_single.emb.{b}_embedder.linear_1",))
        yield Rule(f"{a}.mlp.2", (f"adaln_single.emb.{b}_embedder.linear_2",))
    yield Rule("t_block.1", ("adaln_single.linear",))
    yield Rule("final_layer.linear", ("proj_out",))


FAMILY = Family(
    "pixart",
    "transformer",
    {"original": tuple(_rules())},
    depths={"transformer_blocks": frozenset({28})},
    widths=dict.fromkeys(
        (*(f"{a}.{leaf}" for a in _ATTENTIONS for leaf in ("to_q", "to_k", "to_v")), "ff.net.0.proj"),
        frozenset({1152}),
    ),
    exclusive=("csize_embedder.", "ar_embedder.", "adaln_single.emb.resolution_", "adaln_single.emb.aspect_ratio_"),
    classes=("PixArtTransformer2DModel",),
    words=("pixart",),
)
