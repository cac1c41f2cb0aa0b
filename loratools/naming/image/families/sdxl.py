"""Stable Diffusion XL. kohya's trainers flatten the names of LDM."""

from __future__ import annotations

from loratools.naming.image.family import Family
from loratools.naming.image.parts.ldm_unet import unet_rules

FAMILY = Family(
    "sdxl",
    "unet",
    {"original": unet_rules((0, 2, 10), 10, labels=True)},
    widths={"attn2.to_k": frozenset({2048}), "attn2.to_v": frozenset({2048})},
    words=("sdxl", "stable-diffusion-xl"),
    exclusive=("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "output_blocks.", "middle_block."),
    classes=("UNet2DConditionModel",),
)
