"""Prefixes of trainers that came from kohya's: read where their model has a table, and given back where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools import formats


def lora(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(len(name))
    return {
        f"{name}.lora_down.weight": torch.randn(2, inputs, generator=g),
        f"{name}.lora_up.weight": torch.randn(outputs, 2, generator=g),
        f"{name}.alpha": torch.tensor(1.0),
    }


def test_an_adapter_of_tencents_trainer_is_one_of_hunyuan_video(tmp_path: Path) -> None:
    start = "Hunyuan_video_I2V_lora_double_blocks_3"
    tensors = lora(f"{start}_img_attn_qkv", 36, 12) | lora(f"{start}_txt_mlp_fc1", 48, 12)
    save_file(tensors, tmp_path / "i2v.safetensors")

    loratools.convert(tmp_path / "i2v.safetensors", tmp_path / "comfy.safetensors", format="comfy")

    stored = load_file(tmp_path / "comfy.safetensors")
    block = "diffusion_model.double_blocks.3"
    assert {name.rpartition(".lora_")[0] for name in stored if "lora_" in name} == {
        f"{block}.img_attn.qkv",
        f"{block}.txt_mlp.0",
    }
    delta = stored[f"{block}.img_attn.qkv.lora_B.weight"] @ stored[f"{block}.img_attn.qkv.lora_A.weight"]
    name = f"{start}_img_attn_qkv"
    assert torch.equal(delta, tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"])


def test_an_adapter_of_stable_cascade_keeps_its_names(tmp_path: Path) -> None:
    tensors = lora("lora_prior_unet_down_blocks_0_2_attention_attn_to_q", 14, 12)
    tensors |= lora("lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 6)
    save_file(tensors, tmp_path / "prior.safetensors")

    loratools.resize(tmp_path / "prior.safetensors", tmp_path / "smaller.safetensors", rank=1)

    assert set(load_file(tmp_path / "smaller.safetensors")) == set(tensors)
    with pytest.raises(loratools.LoraToolsError):
        loratools.convert(tmp_path / "prior.safetensors", tmp_path / "out.safetensors", format="diffusers")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_adapter_of_cascades_text_encoder_alone_is_not_renamed(tmp_path: Path) -> None:
    tensors = lora("lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 6)
    save_file(tensors, tmp_path / "prior.safetensors")

    (name,) = formats.detect(tmp_path / "prior.safetensors")

    assert name == "kohya"
    with pytest.raises(loratools.LoraToolsError):
        loratools.convert(tmp_path / "prior.safetensors", tmp_path / "out.safetensors", format="diffusers")
    loratools.convert(tmp_path / "prior.safetensors", tmp_path / "out.safetensors", format="kohya")
    assert set(load_file(tmp_path / "out.safetensors")) == set(tensors)
