"""extract from single files of image models: names of the formats, and the deltas of the two files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools

NAMES = {
    "kohya": "lora_unet_single_blocks_37_linear1.lora_down.weight",
    "comfy": "diffusion_model.single_blocks.37.linear1.lora_A.weight",
    "diffusers": "transformer.single_transformer_blocks.37.proj_mlp.lora_A.weight",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("format", NAMES)
def test_a_single_file_of_flux_is_extracted_under_the_names_of_the_format(
    tmp_path: Path, format: str, prefix: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {f"double_blocks.{i}.img_attn.proj": (6, 6) for i in range(19)}
    shapes |= {f"single_blocks.{i}.linear1": (42, 6) for i in range(38)}
    base = {f"{prefix}{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    base["first_stage_model.decoder.conv_in.weight"] = torch.randn(5, 7, generator=generator)
    tuned = {
        name: w + torch.randn(w.shape[0], 2, generator=generator) @ torch.randn(2, w.shape[1], generator=generator)
        for name, w in base.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    report = loratools.extract(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, rank=2, format=format
    )
    assert any("autoencoder" in warning for warning in report.warnings)
    tensors = load_file(out)
    assert NAMES[format] in tensors
    up = NAMES[format].replace("lora_down", "lora_up").replace("lora_A", "lora_B")
    product = tensors[up].double() @ tensors[NAMES[format]].double()
    name = f"{prefix}single_blocks.37.linear1.weight"
    delta = (tuned[name].double() - base[name].double())[18 if format == "diffusers" else 0 :]
    assert torch.allclose(product, delta, atol=1e-4)
