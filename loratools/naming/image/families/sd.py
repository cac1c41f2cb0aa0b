"""Stable Diffusion 1 and 2. kohya's trainers flatten the names of diffusers' UNet."""

from __future__ import annotations

from loratools.naming.image.family import Family
from loratools.naming.image.parts.ldm_unet import unet_rules

FAMILY = Family(
    "sd",
    "unet",
    {"original": unet_rules((1, 1, 1, 0), 1, labels=False)},
    kohya="diffusers",
    widths={"attn2.to_k": frozenset({768, 1024}), "attn2.to_v": frozenset({768, 1024})},
    words=("sd-v", "sd-1", "sd-2", "sd1", "sd2", "stable-diffusion-v", "stable-diffusion-1", "stable-diffusion-2"),
    text_encoders=1,
    exclusive=("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "output_blocks.", "middle_block."),
    classes=("UNet2DConditionModel",),
)
