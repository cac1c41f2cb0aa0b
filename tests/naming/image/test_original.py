"""Image models in one file: every weight of diffusers' own model is found in it, with the values it has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.naming.language.aliases import aliases
from loratools.naming.places import Alias
from loratools.ops.merge.views import as_updated
from loratools.tensors.lazy import from_torch

diffusers = peers.load("diffusers")


def assembled(alias: Alias, stored: dict[str, Tensor]) -> Tensor:
    """What the places of an alias hold, put together as they say."""
    out = torch.full(alias.shape, torch.nan)
    for place in alias.places:
        rows = place.of.rows.slice if place.of.rows is not None else slice(None)
        out[rows] = as_updated(from_torch(stored[place.weight]), place).read()
    return out


def flux() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same weights under diffusers' names and under those of Black Forest Labs, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden": 3072}
    wide, mlp = sizes["hidden"] // 192, 4 * (sizes["hidden"] // 192)
    original: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        original[f"{name}.weight"], original[f"{name}.bias"] = torch.randn(out, into), torch.randn(out)

    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        linear(f"{block}_attn.qkv", 3 * wide, wide)
        linear(f"{block}_attn.proj", wide, wide)
        linear(f"{block}_mlp.0", mlp, wide)
        linear(f"{block}_mlp.2", wide, mlp)
        linear(f"{block}_mod.lin", 6 * wide, wide)
        for norm in ("query", "key"):
            original[f"{block}_attn.norm.{norm}_norm.scale"] = torch.randn(8)
    linear("single_blocks.0.linear1", 3 * wide + mlp, wide)
    linear("single_blocks.0.linear2", wide, wide + mlp)
    linear("single_blocks.0.modulation.lin", 3 * wide, wide)
    for norm in ("query", "key"):
        original[f"single_blocks.0.norm.{norm}_norm.scale"] = torch.randn(8)
    for name in ("time_in", "vector_in", "guidance_in"):
        linear(f"{name}.in_layer", wide, 12)
        linear(f"{name}.out_layer", wide, wide)
    linear("img_in", wide, 6)
    linear("txt_in", wide, 10)
    linear("final_layer.linear", 6, wide)
    linear("final_layer.adaLN_modulation.1", 2 * wide, wide)
    return original, convert({name: t.clone() for name, t in original.items()})


@peers.needs("diffusers")
def test_every_weight_of_flux_is_found_with_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    original, converted = flux_at_its_width(monkeypatch)

    found = aliases({}, {name: tuple(t.shape) for name, t in original.items()})

    for name, values in converted.items():
        assert torch.equal(assembled(found[f"transformer.{name}"], original), values), name


def flux_at_its_width(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The converter has the width of the published model in it; torch.split of so many is made to follow ours."""
    real = torch.split

    def split(tensor: Tensor, parts: Any, dim: int = 0) -> Any:
        if isinstance(parts, tuple) and sum(parts) != tensor.shape[dim]:
            parts = tuple(p * tensor.shape[dim] // sum(parts) for p in parts)
        return real(tensor, parts, dim=dim)

    monkeypatch.setattr(torch, "split", split)
    return flux()


def test_an_adapter_of_diffusers_merges_into_the_parts_of_a_fused_projection(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.randn(24, 8),
        "model.diffusion_model.double_blocks.0.txt_attn.qkv.weight": torch.randn(24, 8),
        "model.diffusion_model.double_blocks.0.img_mlp.0.weight": torch.randn(32, 8),
        "model.diffusion_model.single_blocks.0.linear1.weight": torch.randn(56, 8),
        "model.diffusion_model.final_layer.adaLN_modulation.1.weight": torch.randn(16, 8),
    }
    save_file(base, tmp_path / "flux.safetensors")
    targets = {
        "transformer_blocks.0.attn.to_k": (8, 8), "single_transformer_blocks.0.proj_mlp": (32, 8),
        "norm_out.linear": (16, 8),
    }  # fmt: skip
    tensors = {}
    for name, (out, into) in targets.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, into)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 3)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")

    loratools.merge(tmp_path / "flux.safetensors", [tmp_path / "pytorch_lora_weights.safetensors"], tmp_path / "merged")

    (file,) = (tmp_path / "merged").glob("*.safetensors")
    found = load_file(file)

    def delta(name: str) -> Tensor:
        return tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]

    expected = {name: t.clone() for name, t in base.items()}
    prefix = "model.diffusion_model."
    expected[f"{prefix}double_blocks.0.img_attn.qkv.weight"][8:16] += delta("transformer_blocks.0.attn.to_k")
    expected[f"{prefix}single_blocks.0.linear1.weight"][24:] += delta("single_transformer_blocks.0.proj_mlp")
    shift = delta("norm_out.linear")  # diffusers has scale before shift
    expected[f"{prefix}final_layer.adaLN_modulation.1.weight"] += torch.cat([shift[8:], shift[:8]])
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
