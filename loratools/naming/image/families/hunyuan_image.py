"""HunyuanImage 2.1: names of the authors, fused (sd-scripts) and apart, of ComfyUI and of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.naming.image.family import Family, Rule
from loratools.naming.image.parts import hunyuan
from loratools.naming.image.parts.double_blocks import attention_of_linear1
from loratools.naming.image.parts.hunyuan import AUTHORS, COMFY, Spelling


def _rules(spelling: Spelling) -> Iterator[Rule]:
    yield from hunyuan.double_blocks(spelling)
    yield from hunyuan.single_blocks(spelling)
    yield from hunyuan.text_refiner(spelling)
    yield from hunyuan.embedder(spelling, "time_in", "time_guidance_embed.timestep_embedder")
    yield from hunyuan.embedder(spelling, "time_r_in", "time_guidance_embed.timestep_embedder_r")
    yield from hunyuan.embedder(spelling, "guidance_in", "time_guidance_embed.guidance_embedder")
    yield from hunyuan.glyphs()
    yield from hunyuan.ends()
    if spelling is AUTHORS:
        # The published checkpoint has these; trainers have them fused.
        for stream in ("img", "txt"):
            yield from hunyuan.projections_apart(stream)
        yield from hunyuan.single_blocks_apart()
    yield from attention_of_linear1()


FAMILY = Family(
    "hunyuan-image",
    "transformer",
    {"original": tuple(_rules(AUTHORS)), "comfy": tuple(_rules(COMFY))},
    depths={"transformer_blocks": frozenset({20}), "single_transformer_blocks": frozenset({40})},
    widths=dict.fromkeys(hunyuan.BLOCK, frozenset({3584})),
    exclusive=(
        *(f"double_blocks.{{}}.{s}_attn_{leaf}" for s in ("img", "txt") for leaf in ("qkv", "proj", "q", "k", "v")),
        *(f"single_blocks.{{}}.linear1_{leaf}" for leaf in ("q", "k", "v", "mlp")),
        *("txt_in.individual_token_refiner.", "context_embedder.token_refiner.", "context_embedder_2.", "byt5_in."),
        *("time_guidance_embed.timestep_embedder_r.", "time_r_in."),
    ),
    classes=("HunyuanImageTransformer2DModel",),
    words=("hunyuan-image", "hunyuanimage"),
)
