"""Ideogram 4: its authors' names, with fused projections, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    attention = "layers.{}.attention"
    yield Rule(f"{attention}.qkv", tuple(f"{attention}.{leaf}" for leaf in _QKV), split="thirds", ratio=3)
    yield Rule(f"{attention}.o", (f"{attention}.to_out.0",), ratio=1)
    yield from same(*(f"layers.{{}}.feed_forward.w{i}" for i in (1, 2, 3)))
    yield from same("layers.{}.adaln_modulation")
    yield from same("input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj")
    yield from same("final_layer.linear", "final_layer.adaln_modulation")


FAMILY = Family(
    "ideogram4",
    "transformer",
    {"original": tuple(_rules())},
    depths={"layers": frozenset({34})},
    widths=dict.fromkeys(
        (*(f"attention.{leaf}" for leaf in _QKV), "feed_forward.w1", "feed_forward.w3"), frozenset({4608})
    ),
    exclusive=("layers.{}.adaln_modulation", "layers.{}.attention.o"),
    classes=("Ideogram4Transformer2DModel",),
    words=("ideogram4", "ideogram-4"),
)
