"""HunyuanVideo and FramePack: names of the authors, which musubi-tuner uses, of ComfyUI and of diffusers.

FramePack was published with the names of diffusers, and has embedders of its own for earlier frames and for an image.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule, same
from loratools.naming.image.parts import hunyuan
from loratools.naming.image.parts.double_blocks import attention_of_linear1
from loratools.naming.image.parts.hunyuan import AUTHORS, COMFY, Spelling


def _rules(spelling: Spelling) -> Iterator[Rule]:
    yield from hunyuan.double_blocks(spelling)
    yield from hunyuan.single_blocks(spelling)
    yield from hunyuan.text_refiner(spelling)
    yield from hunyuan.embedder(spelling, "time_in", "time_text_embed.timestep_embedder")
    yield from hunyuan.embedder(spelling, "guidance_in", "time_text_embed.guidance_embedder")
    yield Rule("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",))
    yield Rule("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",))
    yield from hunyuan.ends()
    yield from same(*(f"clean_x_embedder.{leaf}" for leaf in ("proj", "proj_2x", "proj_4x")))
    yield from same("image_projection.up", "image_projection.down")
    yield from attention_of_linear1()


FAMILY = Family(
    "hunyuan-video",
    "transformer",
    {"original": tuple(_rules(AUTHORS)), "comfy": tuple(_rules(COMFY))},
    depths={"transformer_blocks": frozenset({20}), "single_transformer_blocks": frozenset({40})},
    widths=dict.fromkeys(hunyuan.BLOCK, frozenset({3072})),
    exclusive=(
        *(f"double_blocks.{{}}.{s}_attn_{leaf}" for s in ("img", "txt") for leaf in ("qkv", "proj")),
        *("txt_in.individual_token_refiner.", "context_embedder.token_refiner."),
        *("clean_x_embedder.", "image_projection."),
    ),
    classes=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    words=("hunyuan-video", "hunyuanvideo", "framepack", "hunyuan"),
)
