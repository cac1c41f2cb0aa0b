"""LoKr for diffusers: the families are those whose loaders read it, and what is written loads and computes the same."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import UnsupportedError
from loratools.formats.diffusers import LOKR_FAMILIES
from loratools.naming.image.evidence import denoisers

pytestmark = peers.needs("diffusers")


def test_the_families_are_those_of_the_loaders_that_read_lokr() -> None:
    from diffusers.loaders import lora_pipeline

    reading = {
        name.removesuffix("LoraLoaderMixin").lower()
        for name, mixin in vars(lora_pipeline).items()
        if name.endswith("LoraLoaderMixin") and "lokr" in inspect.getsource(mixin)
    }
    assert {name.replace("-", "") for name in LOKR_FAMILIES} == reading
    assert set(LOKR_FAMILIES) <= {family.name for family in denoisers()}


def z_image() -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        dim=48, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 8, 8],
        axes_lens=[32, 32, 32], in_channels=4,
    )  # fmt: skip
    return model.double().eval()


@pytest.mark.parametrize("factored", [False, True])
def test_lokr_of_z_image_runs_in_diffusers_as_computed(tmp_path: Path, factored: bool) -> None:
    from diffusers import ZImagePipeline

    base, generator = z_image(), torch.Generator().manual_seed(3)
    changed = copy.deepcopy(base)
    stored: dict[str, torch.Tensor] = {}
    for i in range(3):
        for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"layers.{i}.attention.{leaf}"
            key = f"diffusion_model.{name}"
            w1 = 0.2 * torch.randn(4, 4, generator=generator)
            stored[f"{key}.lokr_w1"] = w1
            if factored:
                a, b = 0.2 * torch.randn(12, 2, generator=generator), 0.2 * torch.randn(2, 12, generator=generator)
                stored |= {f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b, f"{key}.alpha": torch.tensor(3.0)}
                delta = 1.5 * torch.kron(w1.double(), a.double() @ b.double())
            else:
                w2 = 0.2 * torch.randn(12, 12, generator=generator)
                stored[f"{key}.lokr_w2"] = w2
                delta = torch.kron(w1.double(), w2.double())
            changed.get_submodule(name).weight.data += delta
    save_file(stored, tmp_path / "comfy.safetensors", {"modelspec.architecture": "z-image/lora"})
    out = tmp_path / "diffusers.safetensors"
    report = loratools.convert(tmp_path / "comfy.safetensors", out, format="diffusers")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-6
    assert not any(key.endswith(".alpha") for key in load_file(out))
    pipe = object.__new__(ZImagePipeline)
    super(ZImagePipeline, pipe).__init__()
    pipe.register_modules(vae=None, text_encoder=None, tokenizer=None, scheduler=None, transformer=copy.deepcopy(base))
    pipe.load_lora_weights(str(out))
    for name, module in changed.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("layers."):
            layer = pipe.transformer.get_submodule(name)
            x = torch.randn(5, module.in_features, generator=generator, dtype=torch.float64)
            torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=1e-6)


def test_lokr_of_another_family_is_refused_with_the_remedy(tmp_path: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    for i in range(19):
        stored[f"lycoris_transformer_blocks_{i}_attn_to_out_0.lokr_w1"] = torch.ones(4, 4)
        stored[f"lycoris_transformer_blocks_{i}_attn_to_out_0.lokr_w2"] = torch.ones(12, 12)
    save_file(stored, tmp_path / "one.safetensors", {"modelspec.architecture": "flux-1-dev/lora"})
    with pytest.raises(UnsupportedError) as refused:
        loratools.convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", format="diffusers")
    assert "flux2 and z-image only; 'loratools resize' makes LoRA of it" in refused.value.details[0]
    loratools.resize(tmp_path / "one.safetensors", tmp_path / "two.safetensors", rank=1, format="diffusers")
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight" in load_file(tmp_path / "two.safetensors")
