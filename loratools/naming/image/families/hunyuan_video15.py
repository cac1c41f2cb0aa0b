"""HunyuanVideo 1.5: double blocks only; names of the authors, which musubi-tuner uses, of ComfyUI and of diffusers.

The authors have queries, keys and values apart, ComfyUI has them fused.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule
from loratools.naming.image.parts import hunyuan
from loratools.naming.image.parts.hunyuan import AUTHORS, COMFY, Spelling


def _rules(spelling: Spelling) -> Iterator[Rule]:
    yield from hunyuan.double_blocks(spelling, apart=spelling is AUTHORS)
    yield from hunyuan.text_refiner(spelling)
    yield from hunyuan.embedder(spelling, "time_in", "time_embed.timestep_embedder")
    yield from hunyuan.embedder(spelling, "time_r_in", "time_embed.timestep_embedder_r")
    yield from hunyuan.glyphs()
    image = {"0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out"}
    yield from (Rule(f"vision_in.proj.{a}", (f"image_embedder.{b}",)) for a, b in image.items())
    yield Rule("cond_type_embedding", ("cond_type_embed",))
    yield from hunyuan.ends()


FAMILY = Family(
    "hunyuan-video15",
    "transformer",
    {"original": tuple(_rules(AUTHORS)), "comfy": tuple(_rules(COMFY))},
    depths={"transformer_blocks": frozenset({54})},
    widths=dict.fromkeys(hunyuan.BLOCK, frozenset({2048})),
    exclusive=(
        *(f"double_blocks.{{}}.{s}_attn_{leaf}" for s in ("img", "txt") for leaf in "qkv"),
        *("txt_in.individual_token_refiner.", "context_embedder.token_refiner.", "context_embedder_2.", "byt5_in."),
        *("vision_in.proj.", "image_embedder.linear_", "cond_type_embed"),
    ),
    classes=("HunyuanVideo15Transformer3DModel",),
    words=("hunyuan-video-1-5", "hunyuan-video1-5", "hunyuanvideo-1-5", "hunyuanvideo1-5"),
)
