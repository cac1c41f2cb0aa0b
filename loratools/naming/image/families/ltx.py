"""LTX-Video (2B and 13B): its authors' names and those of diffusers, which differ outside of the blocks."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_ATTENTIONS = ("attn1", "attn2")


def _rules() -> Iterator[Rule]:
    block = "transformer_blocks.{}"
    for attention in _ATTENTIONS:
        yield from same(*(f"{block}.{attention}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")), ratio=1)
        yield from (Rule(f"{block}.{attention}.{q}_norm", (f"{block}.{attention}.norm_{q}",)) for q in ("q", "k"))
    yield from same(f"{block}.ff.net.0.proj", ratio=4)
    yield from same(f"{block}.ff.net.2", ratio=1 / 4)
    yield Rule("patchify_proj", ("proj_in",))
    for leaf in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"):
        yield Rule(f"adaln_single.{leaf}", (f"time_embed.{leaf}",))
    yield from same("caption_projection.linear_1", "caption_projection.linear_2", "proj_out")


FAMILY = Family(
    "ltx",
    "transformer",
    {"original": tuple(_rules())},
    # 2B and 13B.
    depths={"transformer_blocks": frozenset({28, 48})},
    widths=dict.fromkeys(
        (*(f"{a}.{leaf}" for a in _ATTENTIONS for leaf in ("to_q", "to_k", "to_v")), "ff.net.0.proj"),
        frozenset({2048, 4096}),
    ),
    exclusive=("patchify_proj",),
    classes=("LTXVideoTransformer3DModel",),
    words=("ltx", "ltxv"),
)
