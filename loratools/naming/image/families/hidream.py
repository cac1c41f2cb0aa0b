"""HiDream-I1: published with the names that diffusers has, experts included."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    for stream, modulations in {"double_stream_blocks": 12, "single_stream_blocks": 6}.items():
        block = f"{stream}.{{}}.block"
        texts = ("", "_t") if stream.startswith("double") else ("",)
        for text in texts:
            yield from same(*(f"{block}.attn1.{leaf}{text}" for leaf in (*_QKV, "to_out")), ratio=1)
            yield from same(*(f"{block}.attn1.{q}_rms_norm{text}" for q in ("q", "k")))
        networks = ["ff_i.shared_experts", "ff_i.experts.{}", *(["ff_t"] if len(texts) > 1 else [])]
        yield from same(*(f"{block}.{network}.w{i}" for network in networks for i in (1, 2, 3)))
        yield from same(f"{block}.ff_i.gate")
        yield from same(f"{block}.adaLN_modulation.1", ratio=modulations)
    yield from same("t_embedder.timestep_embedder.linear_1", "t_embedder.timestep_embedder.linear_2")
    yield from same("p_embedder.pooled_embedder.linear_1", "p_embedder.pooled_embedder.linear_2")
    yield from same("x_embedder.proj", "caption_projection.{}.linear")
    yield from same("final_layer.linear", "final_layer.adaLN_modulation.1")


FAMILY = Family(
    "hidream",
    "transformer",
    {"original": tuple(_rules())},
    depths={"double_stream_blocks": frozenset({16}), "single_stream_blocks": frozenset({32})},
    widths=dict.fromkeys(
        (*(f"attn1.{leaf}" for leaf in _QKV), "shared_experts.w1", "ff_t.w1", "experts.{}.w1"), frozenset({2560})
    ),
    exclusive=("double_stream_blocks.", "single_stream_blocks."),
    classes=("HiDreamImageTransformer2DModel",),
    words=("hidream",),
)
