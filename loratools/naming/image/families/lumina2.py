"""Lumina Image 2.0: its authors' names, with fused grouped-query attention, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    for stage in ("layers", "noise_refiner", "context_refiner"):
        block = f"{stage}.{{}}"
        yield Rule(
            f"{block}.attention.qkv", tuple(f"{block}.attn.{leaf}" for leaf in _QKV), split="grouped", ratio=5 / 3
        )
        yield Rule(f"{block}.attention.out", (f"{block}.attn.to_out.0",), ratio=1)
        yield from (Rule(f"{block}.attention.{q}_norm", (f"{block}.attn.norm_{q}",)) for q in ("q", "k"))
        yield from (Rule(f"{block}.feed_forward.w{i}", (f"{block}.feed_forward.linear_{i}",)) for i in (1, 2, 3))
        if stage != "context_refiner":
            yield Rule(f"{block}.adaLN_modulation.1", (f"{block}.norm1.linear",))
    yield from same("x_embedder")
    for i, j in ((0, 1), (2, 2)):
        yield Rule(f"t_embedder.mlp.{i}", (f"time_caption_embed.timestep_embedder.linear_{j}",))
    yield from (Rule(f"cap_embedder.{i}", (f"time_caption_embed.caption_embedder.{i}",)) for i in (0, 1))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",))
    yield Rule("final_layer.linear", ("norm_out.linear_2",))


FAMILY = Family(
    "lumina2",
    "transformer",
    {"original": tuple(_rules())},
    depths={"layers": frozenset({26}), "noise_refiner": frozenset({2}), "context_refiner": frozenset({2})},
    widths=dict.fromkeys(
        (*(f"attn.{leaf}" for leaf in _QKV), "feed_forward.linear_1", "feed_forward.linear_3"), frozenset({2304})
    ),
    exclusive=("layers.{}.adaLN_modulation.1", "noise_refiner.{}.adaLN_modulation.1"),
    classes=("Lumina2Transformer2DModel",),
    words=("lumina",),
)
