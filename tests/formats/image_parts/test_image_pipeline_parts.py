"""Parts of a pipeline: all into which diffusers loads adapters are read; a second transformer has its own file."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import UnsupportedError
from loratools.naming.image.pipeline import PIPELINE_PARTS


def lora(name: str, rank: int = 2, width: int = 48) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.randn(rank, width), f"{name}.lora_B.weight": torch.randn(width, rank)}


@pytest.mark.parametrize("part", ["connectors", "text_conditioner", "conditional_transformer", "transformer_ref"])
def test_further_parts_of_a_pipeline_are_read_with_the_alpha_of_the_header(tmp_path: Path, part: str) -> None:
    stored = lora("transformer.transformer_blocks.0.attn1.to_q") | lora(f"{part}.blocks.0.q_proj")
    save_file(stored, tmp_path / "plain.safetensors")
    alphas = {
        f"{name}.{field}": value for name in ("transformer", part) for field, value in (("r", 2), ("lora_alpha", 4))
    }
    save_file(stored, tmp_path / "scaled.safetensors", {"lora_adapter_metadata": json.dumps(alphas)})
    for file, scale in (("plain", 1.0), ("scaled", 2.0)):
        adapter = loratools.load(tmp_path / f"{file}.safetensors")
        assert adapter.format == "diffusers"
        assert {update.scale for update in adapter.updates.values()} == {scale}
        assert f"{part}.blocks.0.q_proj" in adapter.updates


def test_a_further_part_goes_back_to_diffusers_and_nowhere_else(tmp_path: Path) -> None:
    stored = {k: v for i in range(30) for k, v in lora(f"transformer.layers.{i}.attention.to_q").items()}
    stored |= lora("connectors.blocks.0.q_proj")
    save_file(stored, tmp_path / "one.safetensors", {"modelspec.architecture": "z-image/lora"})
    loratools.convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", format="diffusers")
    again = load_file(tmp_path / "two.safetensors")
    assert set(again) == set(stored)
    with pytest.raises(UnsupportedError, match="connectors") as refused:
        loratools.convert(tmp_path / "one.safetensors", tmp_path / "three.safetensors", format="kohya")
    assert len(refused.value.details) == 1


@peers.needs("diffusers")
def test_every_part_that_a_loader_of_the_installed_diffusers_names_is_read() -> None:
    from diffusers.loaders import lora_pipeline

    mixins = [m for name, m in vars(lora_pipeline).items() if name.endswith("LoraLoaderMixin")]
    parts = {part for mixin in mixins for part in mixin._lora_loadable_modules}
    assert len(mixins) > 10
    assert parts <= set(PIPELINE_PARTS)


@pytest.fixture
def wan(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    stored: dict[str, torch.Tensor] = {}
    for i in range(40):
        # As wide as Wan 14B: HunyuanDiT has as many blocks with modules of this name.
        stored |= lora(f"transformer.blocks.{i}.attn1.to_q", width=5120)
        stored |= lora(f"transformer_2.blocks.{i}.attn1.to_q", 3, 5120)
    save_file(stored, tmp_path / "both.safetensors")
    return tmp_path / "both.safetensors", stored


@pytest.mark.parametrize(
    ("format", "key", "down"),
    [
        ("comfy", "diffusion_model.blocks.7.self_attn.q", "lora_A"),
        ("kohya", "lora_unet_blocks_7_self_attn_q", "lora_down"),
        ("lycoris", "lycoris_blocks_7_attn1_to_q", "lora_down"),
        ("onetrainer", "lora_transformer_blocks_7_attn1_to_q", "lora_down"),
    ],
)
def test_each_of_two_transformers_is_written_alone(
    tmp_path: Path, wan: tuple[Path, dict[str, torch.Tensor]], format: str, key: str, down: str
) -> None:
    both, stored = wan
    for part, rank in (("transformer", 2), ("transformer_2", 3)):
        out = tmp_path / f"{part}.safetensors"
        loratools.convert(both, out, format=format, include=f"{part}.*")
        written = load_file(out)[f"{key}.{down}.weight"]
        assert written.shape == (rank, 5120)
        assert torch.equal(written, stored[f"{part}.blocks.7.attn1.to_q.lora_A.weight"])


def test_both_transformers_in_one_file_for_one_are_refused_with_the_remedy(
    tmp_path: Path, wan: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    with pytest.raises(UnsupportedError, match="40 parts") as refused:
        loratools.convert(wan[0], tmp_path / "out.safetensors", format="comfy")
    assert "--include 'transformer_2.*'" in refused.value.details[0]


def test_a_second_transformer_alone_stays_second_in_a_file_of_diffusers(
    tmp_path: Path, wan: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    loratools.convert(wan[0], tmp_path / "out.safetensors", format="diffusers", include="transformer_2.*")
    assert all(key.startswith("transformer_2.") for key in load_file(tmp_path / "out.safetensors"))
