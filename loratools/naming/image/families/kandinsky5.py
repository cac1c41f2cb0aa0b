"""Kandinsky 5, for images and videos: published with the names that diffusers has, which musubi-tuner flattens."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")
_STREAMS = {"text": ("self_attention",), "visual": ("self_attention", "cross_attention")}


def _rules() -> Iterator[Rule]:
    for stream, attentions in _STREAMS.items():
        block = f"{stream}_transformer_blocks.{{}}"
        for attention in attentions:
            yield from same(*(f"{block}.{attention}.{leaf}" for leaf in _PROJECTIONS), ratio=1)
            yield from same(*(f"{block}.{attention}.{q}_norm" for q in ("query", "key")))
        yield from same(f"{block}.feed_forward.in_layer", f"{block}.feed_forward.out_layer")
        yield from same(f"{block}.{stream}_modulation.out_layer")
    yield from same("time_embeddings.in_layer", "time_embeddings.out_layer", "visual_embeddings.in_layer")
    for name in ("text_embeddings", "pooled_text_embeddings"):
        yield from same(f"{name}.in_layer", f"{name}.norm")
    yield from same("out_layer.modulation.out_layer", "out_layer.out_layer")


FAMILY = Family(
    "kandinsky5",
    "transformer",
    {"original": tuple(_rules())},
    kohya="diffusers",
    # Video Lite, Video Pro, Image Lite.
    depths={"visual_transformer_blocks": frozenset({32, 60, 50}), "text_transformer_blocks": frozenset({2, 4})},
    widths=dict.fromkeys(
        (*(f"attention.{leaf}" for leaf in _PROJECTIONS[:3]), "feed_forward.in_layer"), frozenset({1792, 4096, 2560})
    ),
    exclusive=("visual_transformer_blocks.", "text_transformer_blocks."),
    classes=("Kandinsky5Transformer3DModel",),
    words=("kandinsky5", "kandinsky-5", "k5-lite", "k5-pro"),
)
