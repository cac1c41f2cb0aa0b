"""Wan 2.1 and 2.2: the authors' names and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule

_QKV = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    for a, b in {"self_attn": "attn1", "cross_attn": "attn2"}.items():
        leaves = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
        if b == "attn2":
            leaves |= {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
        for c, d in leaves.items():
            yield Rule(f"blocks.{{}}.{a}.{c}", (f"blocks.{{}}.{b}.{d}",))
    names = {
        "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
        "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
        "blocks.{}.norm3": "blocks.{}.norm2",
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "head.head": "proj_out",
    }
    for a, b in names.items():
        yield Rule(a, (b,))


FAMILY = Family(
    "wan",
    "transformer",
    {"original": tuple(_rules())},
    # 1.3B and 5B, 14B.
    depths={"blocks": frozenset({30, 40})},
    widths=dict.fromkeys(
        (*(f"attn{i}.{leaf}" for i in (1, 2) for leaf in _QKV), "ffn.net.0.proj"), frozenset({1536, 3072, 5120})
    ),
    exclusive=(
        *(f"blocks.{{}}.{part}.{leaf}" for part in ("self_attn", "cross_attn") for leaf in ("q", "k", "v", "o")),
        *(f"blocks.{{}}.attn{i}.{leaf}" for i in (1, 2) for leaf in _QKV),
        *("blocks.{}.ffn.0", "blocks.{}.ffn.net."),
        "condition_embedder.",
    ),
    classes=("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"),
    words=("wan", "skyreels-v2"),
)
