"""A pipeline into which diffusers fused an adapter is called the same, and PEFT is told, which merges there."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import save_file

import loratools

pytestmark = peers.needs("diffusers")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write_inputs(tmp_path: Path, dtype: torch.dtype) -> None:
    """Write a tiny pipeline in that dtype, and a kohya adapter of all of its attention and feed-forward layers."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=10, attention_head_dim=2,
    )  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20, hidden_size=10, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=7,
        )
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=encoder.to(dtype), tokenizer=None, unet=unet.to(dtype),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(5)
    stored = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ("attn" in name or ".ff." in name):
            key = f"lora_unet_{name.replace('.', '_')}"
            stored[f"{key}.lora_down.weight"] = torch.randn(3, module.in_features, generator=generator) * 0.3
            stored[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 3, generator=generator) * 0.3
            stored[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(stored, tmp_path / "kohya.safetensors")


def fuse(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    """Let diffusers fuse the adapter and save the pipeline as `merged`."""
    import diffusers

    absent = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "base", torch_dtype=dtype, requires_safety_checker=False, **absent
    )
    pipeline.load_lora_weights(str(tmp_path / "kohya.safetensors"))
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_peft_is_told_of_a_pipeline_that_diffusers_fused(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    # Weights are so small that several recipes explain some of them: one program explains them all.
    write_inputs(tmp_path, dtype)
    fuse(tmp_path, dtype, scale)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", [(tmp_path / "kohya.safetensors", scale)])

    assert (report.verdict, report.diagnosis) == ("same", ())
    assert any(program.startswith("PEFT") for program in report.merged_by)
    assert ("loratools" in report.merged_by) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loratools_is_told_of_a_pipeline_that_it_merged(tmp_path: Path, dtype: torch.dtype) -> None:
    write_inputs(tmp_path, dtype)
    loratools.merge(tmp_path / "base", tmp_path / "kohya.safetensors", tmp_path / "merged")

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "kohya.safetensors")

    assert (report.verdict, report.diagnosis) == ("same", ())
    assert "loratools" in report.merged_by
    assert "PEFT on a CPU with an adapter in that dtype" not in report.merged_by
