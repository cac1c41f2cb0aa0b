"""The refiner of Stable Diffusion XL."""

from __future__ import annotations

from loratools.naming.image.family import Family
from loratools.naming.image.parts.ldm_unet import unet_rules

FAMILY = Family(
    "sdxl-refiner",
    "unet",
    {"original": unet_rules((0, 4, 4, 0), 4, labels=True)},
    widths={"attn2.to_k": frozenset({1280}), "attn2.to_v": frozenset({1280})},
    words=("sdxl-refiner", "sdxl-base-v1-0-refiner", "stable-diffusion-xl-v1-refiner", "stable-diffusion-xl-refiner"),
    exclusive=("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "output_blocks.", "middle_block."),
    classes=("UNet2DConditionModel",),
)
