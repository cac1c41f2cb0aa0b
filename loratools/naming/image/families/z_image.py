"""Z-Image: its authors' names, after Lumina, and those of diffusers, which musubi-tuner flattens."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    for stage in ("layers", "noise_refiner", "context_refiner"):
        block = f"{stage}.{{}}"
        attention = f"{block}.attention"
        yield Rule(f"{attention}.qkv", tuple(f"{attention}.{leaf}" for leaf in _QKV), split="thirds", ratio=3)
        yield Rule(f"{attention}.out", (f"{attention}.to_out.0",), ratio=1)
        yield from (Rule(f"{attention}.{q}_norm", (f"{attention}.norm_{q}",)) for q in ("q", "k"))
        yield from same(*(f"{block}.feed_forward.w{i}" for i in (1, 2, 3)))
        yield from same(*(f"{block}.{norm}{i}" for norm in ("attention_norm", "ffn_norm") for i in (1, 2)))
        yield from same(f"{block}.adaLN_modulation.0")
    yield from same("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")
    # The patch size is in the name: 2 pixels, 1 frame.
    yield Rule("x_embedder", ("all_x_embedder.2-1",))
    yield Rule("final_layer.linear", ("all_final_layer.2-1.linear",))
    yield Rule("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",))


FAMILY = Family(
    "z-image",
    "transformer",
    {"original": tuple(_rules())},
    kohya="diffusers",
    depths={"layers": frozenset({30}), "noise_refiner": frozenset({2}), "context_refiner": frozenset({2})},
    widths=dict.fromkeys(
        (*(f"attention.{leaf}" for leaf in _QKV), "feed_forward.w1", "feed_forward.w3"), frozenset({3840})
    ),
    exclusive=("layers.{}.adaLN_modulation.0", "noise_refiner.{}.adaLN_modulation.0", "all_x_embedder."),
    classes=("ZImageTransformer2DModel",),
    words=("z-image", "zimage"),
)
