"""Names and cuts of image formats against diffusers' own converters, on every linear layer of its models.

A converter gets the file that we have written with the authors' names, and must make of it the products that the file
was written from. Where a converter is known to be wrong (reference, 2.3) the module is left out, by name.
"""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file

from loratools import formats
from loratools.adapter import Adapter
from loratools.formats.image_parts import writing
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

Products = dict[str, tuple[torch.Tensor, torch.Tensor]]

FLUX = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 12}
# name -> class and config, small; converter; format; modules that the converter does not know or has wrong
CASES: dict[str, tuple[str, dict[str, object], str, str, tuple[str, ...]]] = {
    "flux-kohya": (
        "FluxTransformer2DModel",
        # The converter has the width of the real model in it.
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
        "_convert_kohya_flux_lora_to_diffusers",
        "kohya",
        (),
    ),
    "flux2-comfy": (
        "Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "num_layers": 2, "num_single_layers": 2, "in_channels": 4},
        "_convert_non_diffusers_flux2_lora_to_diffusers",
        "comfy",
        ("norm_out",),  # its halves are not swapped, as those of the base are
    ),
    "wan-comfy": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 20, "text_dim": 14,
            "image_dim": 10, "added_kv_proj_dim": 24, "freq_dim": 16,
        },
        "_convert_non_diffusers_wan_lora_to_diffusers",
        "comfy",
        (),
    ),
    "z-image-comfy": (
        "ZImageTransformer2DModel",
        {"dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 18, "axes_dims": (32, 48, 48)},
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        "comfy",
        ("t_embedder", "cap_embedder", "all_"),
    ),
    "lumina2-comfy": (
        "Lumina2Transformer2DModel",
        # The converter has the sizes of the real model in it.
        {"num_layers": 2},
        "_convert_non_diffusers_lumina2_lora_to_diffusers",
        "comfy",
        ("x_embedder", "time_caption_embed", "norm_out"),
    ),
    "krea2-comfy": (
        "Krea2Transformer2DModel",
        {},
        "_convert_non_diffusers_krea2_lora_to_diffusers",
        "comfy",
        (),
    ),
    "qwen-image-kohya": (
        "QwenImageTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "joint_attention_dim": 20},
        "_convert_non_diffusers_qwen_lora_to_diffusers",
        "kohya",
        ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out", "img_mod", "txt_mod"),
    ),
}  # fmt: skip


def adapter_of(cls: str, config: dict[str, object], without: tuple[str, ...]) -> tuple[Adapter, Products]:
    """LoRA of rank 2 and alpha 1 on every linear layer; q, k and v with factors of their own."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
    generator = torch.Generator().manual_seed(3)
    products: Products = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(without):
            a = torch.randn(2, module.in_features, generator=generator)
            products[f"transformer.{name}"] = a, torch.randn(module.out_features, 2, generator=generator)
    updates = {n: LoRA(from_torch(a), from_torch(b), 1.0, "tensor") for n, (a, b) in products.items()}
    # Of the layers outside of the blocks of Flux, the converter drops alpha.
    outside = [n for n in updates if "_blocks." not in n] if cls == "FluxTransformer2DModel" else []
    for name in outside:
        a, b = products[name]
        updates[name] = LoRA(from_torch(a), from_torch(b), 2.0, "tensor")
        products[name] = a, 2 * b
    return Adapter(updates), products


@peers.needs("diffusers")
@pytest.mark.parametrize("case", CASES)
def test_diffusers_makes_the_same_products_of_the_authors_names(case: str, tmp_path: Path) -> None:
    from diffusers.loaders import lora_conversion_utils

    cls, config, converter, format, without = CASES[case]
    adapter, products = adapter_of(cls, config, without)
    path = tmp_path / "lora.safetensors"
    formats.save(adapter, path, format=format)
    stored = load_file(path)
    if case.startswith("z-image"):
        # It takes fused projections only where the factors are spelled so.
        stored = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in stored.items()}
    elif format == "comfy":
        # These know factors only, or alpha of some modules: the scale goes into B.
        stored = {k: v * 0.5 if "lora_B" in k else v for k, v in _unscaled(stored).items()}
    converted = getattr(lora_conversion_utils, converter)(stored)
    # Some names are without the part of the pipeline, which the loader adds.
    made = {k if k.startswith("transformer.") else f"transformer.{k}": v for k, v in converted.items()}
    assert {k.split(".lora_")[0] for k in made} == set(products)
    for name, (a, b) in products.items():
        x = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = made[f"{name}.lora_B.weight"].double() @ (made[f"{name}.lora_A.weight"].double() @ x)
        expected = 0.5 * b.double() @ (a.double() @ x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _unscaled(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert all(v.item() in (1.0, 3.0) for k, v in stored.items() if k.endswith(".alpha"))
    return {k: v for k, v in stored.items() if not k.endswith(".alpha")}


@peers.needs("diffusers")
def test_cutting_apart_again_gives_back_every_factor(tmp_path: Path) -> None:
    adapter, products = adapter_of("FluxTransformer2DModel", {**FLUX, "num_layers": 2, "num_single_layers": 3}, ())
    formats.save(adapter, tmp_path / "one.safetensors", format="kohya")
    formats.save(formats.load(tmp_path / "one.safetensors"), tmp_path / "two.safetensors", format="diffusers")
    back = load_file(tmp_path / "two.safetensors")
    assert set(back) == {f"{n}.lora_{part}.weight" for n in products for part in "AB"}
    for name in products:
        update = adapter.updates[name]
        assert torch.equal(back[f"{name}.lora_A.weight"], update.parts["A"].read())
        assert torch.equal(back[f"{name}.lora_B.weight"], update.parts["B"].read())


def test_the_layout_of_a_file_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"b": torch.ones(3, dtype=torch.float16), "a": torch.ones(2), "c.alpha": torch.tensor(4.0)}
    writing.write_file(tmp_path / "ours.safetensors", {k: from_torch(v) for k, v in tensors.items()}, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
