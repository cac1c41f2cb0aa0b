"""Qwen-Image, also for editing and in layers: published with the names of diffusers, which musubi-tuner flattens."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same

_QKV = ("to_q", "to_k", "to_v")


def _rules() -> Iterator[Rule]:
    attention = (*_QKV, "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    block = "transformer_blocks.{}"
    yield from same(*(f"{block}.attn.{leaf}" for leaf in attention), ratio=1)
    yield from same(*(f"{block}.attn.{leaf}" for leaf in norms))
    for stream in ("img", "txt"):
        yield from same(f"{block}.{stream}_mlp.net.0.proj", f"{block}.{stream}_mlp.net.2", f"{block}.{stream}_mod.1")
    yield from same("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out")
    yield from same(*(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)))


FAMILY = Family(
    "qwen-image",
    "transformer",
    {"original": tuple(_rules())},
    kohya="diffusers",
    depths={"transformer_blocks": frozenset({60})},
    widths=dict.fromkeys(
        (
            *(f"attn.{leaf}" for leaf in (*_QKV, "add_q_proj", "add_k_proj", "add_v_proj")),
            *(f"{stream}_mlp.net.0.proj" for stream in ("img", "txt")),
        ),
        frozenset({3072}),
    ),
    exclusive=tuple(f"transformer_blocks.{{}}.{s}_{part}." for s in ("img", "txt") for part in ("mlp", "mod")),
    classes=("QwenImageTransformer2DModel",),
    words=("qwen-image", "qwen"),
)
