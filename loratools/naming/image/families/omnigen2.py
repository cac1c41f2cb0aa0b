"""OmniGen2: published with the names that Lumina 2 has in diffusers, and a refiner for reference images."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_STAGES = ("layers", "noise_refiner", "ref_image_refiner", "context_refiner")


def _rules() -> Iterator[Rule]:
    for stage in _STAGES:
        block = f"{stage}.{{}}"
        # 21 heads of queries and 7 of keys and values.
        for leaf, ratio in {"to_q": 1.0, "to_k": 1 / 3, "to_v": 1 / 3, "to_out.0": 1.0}.items():
            yield from same(f"{block}.attn.{leaf}", ratio=ratio)
        yield from same(*(f"{block}.attn.norm_{q}" for q in ("q", "k")))
        yield from same(*(f"{block}.feed_forward.linear_{i}" for i in (1, 2, 3)))
        # Without modulation, the norms of the refiner of the text have a weight of their own.
        yield from same(f"{block}.norm1" if stage == "context_refiner" else f"{block}.norm1.linear")
        yield from same(*(f"{block}.{norm}" for norm in ("norm2", "ffn_norm1", "ffn_norm2")))
    yield from same("x_embedder", "ref_image_patch_embedder", "norm_out.linear_1", "norm_out.linear_2")
    yield from same(*(f"time_caption_embed.timestep_embedder.linear_{i}" for i in (1, 2)))
    yield from same(*(f"time_caption_embed.caption_embedder.{i}" for i in (0, 1)))


FAMILY = Family(
    "omnigen2",
    "transformer",
    {"original": tuple(_rules())},
    depths={"layers": frozenset({32}), **dict.fromkeys(_STAGES[1:], frozenset({2}))},
    widths=dict.fromkeys(
        (*(f"attn.{leaf}" for leaf in ("to_q", "to_k", "to_v")), "feed_forward.linear_1", "feed_forward.linear_3"),
        frozenset({2520}),
    ),
    exclusive=("ref_image_refiner.", "ref_image_patch_embedder"),
    classes=("OmniGen2Transformer2DModel",),
    words=("omnigen2", "omnigen-2"),
)
