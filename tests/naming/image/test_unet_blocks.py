"""Blocks of a U-Net by name, held against the order in which the original model numbers them."""

from __future__ import annotations

import pytest

from loratools.errors import UsageError
from loratools.naming.image.unet_blocks import block_of, weights_by_block


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "BASE"),
        ("unet.conv_in", "IN00"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("down_blocks.0.downsamplers.0.conv", "IN03"),
        ("lora_unet_down_blocks_2_attentions_1_proj_in", "IN08"),
        ("unet.down_blocks.3.resnets.1.conv1", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "MID"),
        ("middle_block.1.proj_in", "MID"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "OUT02"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "OUT03"),
        ("up_blocks.3.attentions.2.proj_in", "OUT11"),
        ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
        ("output_blocks.5.1.proj_in", "OUT05"),
        ("unet.time_embedding.linear_1", "BASE"),
        ("model.layers.3.self_attn.q_proj", None),
    ],
)
def test_block_of_a_name(name: str, block: str | None) -> None:
    assert block_of(name) == block


def test_lists_by_their_length() -> None:
    sd1 = weights_by_block([0.5, *range(1, 7), 7, *range(8, 17)])
    assert (sd1["BASE"], sd1["IN01"], sd1["IN08"], sd1["MID"], sd1["OUT03"], sd1["OUT11"]) == (0.5, 1, 6, 7, 8, 16)
    # What a list leaves out keeps its weight.
    assert (sd1["IN00"], sd1["OUT02"]) == (1, 1)
    sdxl = weights_by_block(range(12))
    assert (sdxl["IN04"], sdxl["IN08"], sdxl["MID"], sdxl["OUT00"], sdxl["OUT05"]) == (1, 4, 5, 6, 11)
    assert weights_by_block(range(20))["OUT08"] == 19
    assert weights_by_block(range(26))["OUT11"] == 25
    with pytest.raises(UsageError, match="lists of 12 and 20"):
        weights_by_block([1.0] * 13)
