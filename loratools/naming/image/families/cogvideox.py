"""CogVideoX: the names of diffusers, which every trainer of it has; one attention for video and text together."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same


def _rules() -> Iterator[Rule]:
    block = "transformer_blocks.{}"
    yield from same(*(f"{block}.attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")), ratio=1)
    yield from same(*(f"{block}.attn1.norm_{q}" for q in ("q", "k")))
    yield from same(f"{block}.ff.net.0.proj", ratio=4)
    yield from same(f"{block}.ff.net.2", ratio=1 / 4)
    yield from same(*(f"{block}.{norm}.{leaf}" for norm in ("norm1", "norm2") for leaf in ("linear", "norm")))
    yield from same("patch_embed.proj", "patch_embed.text_proj")
    yield from same(*(f"{name}.linear_{i}" for name in ("time_embedding", "ofs_embedding") for i in (1, 2)))
    yield from same("norm_final", "norm_out.linear", "norm_out.norm", "proj_out")


FAMILY = Family(
    "cogvideox",
    "transformer",
    {"original": tuple(_rules())},
    # 2B and 5B.
    depths={"transformer_blocks": frozenset({30, 42})},
    widths=dict.fromkeys(
        (*(f"attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v")), "ff.net.0.proj"), frozenset({1920, 3072})
    ),
    exclusive=("transformer_blocks.{}.norm2.linear", "patch_embed.text_proj", "ofs_embedding."),
    classes=("CogVideoXTransformer3DModel",),
    words=("cogvideox", "cogvideo"),
)
