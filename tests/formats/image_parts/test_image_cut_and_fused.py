"""Kinds other than LoRA go between fused and separate projections where that is exact, and are refused where not.

Expected deltas are float64 arithmetic from the stored parts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import UnsupportedError

Z_IMAGE = "diffusion_model.layers.{}.attention"
LAYERS = 30


def hada(name: str, rows: int, columns: int, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"w1_a": (rows, rank), "w1_b": (rank, columns), "w2_a": (rows, rank), "w2_b": (rank, columns)}
    return {f"{name}.hada_{part}": torch.randn(*shape, generator=generator) for part, shape in shapes.items()}


def hada_delta(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    w1_a, w1_b, w2_a, w2_b = (stored[f"{name}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = stored[f"{name}.alpha"].item() / w1_b.shape[0] if f"{name}.alpha" in stored else 1.0
    return scale * (w1_a @ w1_b) * (w2_a @ w2_b)


def kron_delta(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Of parts that are whole, which LyCORIS does not scale; or of a W2 in two factors, which it does."""
    w1 = stored[f"{name}.lokr_w1"].double()
    if f"{name}.lokr_w2" in stored:
        return torch.kron(w1, stored[f"{name}.lokr_w2"].double())
    a, b = (stored[f"{name}.lokr_w2_{part}"].double() for part in "ab")
    alpha = stored.get(f"{name}.alpha")
    return torch.kron(w1, a @ b) * (alpha.item() / b.shape[0] if alpha is not None else 1.0)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alphas", [(None, None, None), (2.0, 2.0, 2.0), (1.0, 2.0, 3.0)])
def test_loha_of_queries_keys_and_values_becomes_one_of_the_fused_projection(
    tmp_path: Path, alphas: tuple[float | None, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, torch.Tensor] = {}
    for i in range(LAYERS):
        for j, (leaf, alpha) in enumerate(zip(("to_q", "to_k", "to_v"), alphas, strict=True)):
            name = f"lycoris_layers_{i}_attention_{leaf}"
            stored |= hada(name, 48, 48, 2 + j, generator)
            if alpha is not None:
                stored[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(stored, tmp_path / "apart.safetensors", {"modelspec.architecture": "z-image/lora"})
    report = loratools.convert(tmp_path / "apart.safetensors", tmp_path / "fused.safetensors", format="comfy")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-6
    written = load_file(tmp_path / "fused.safetensors")
    fused = f"{Z_IMAGE.format(7)}.qkv"
    assert written[f"{fused}.hada_w1_b"].shape == (2 + 3 + 4, 48)
    parts = [hada_delta(stored, f"lycoris_layers_7_attention_{leaf}") for leaf in ("to_q", "to_k", "to_v")]
    close(hada_delta(written, fused), torch.cat(parts))
    # And apart again, each with its own rows.
    loratools.convert(tmp_path / "fused.safetensors", tmp_path / "again.safetensors", format="lycoris")
    again = load_file(tmp_path / "again.safetensors")
    close(hada_delta(again, "lycoris_layers_7_attention_to_k"), parts[1])


def test_lokr_of_queries_keys_and_values_is_refused_with_the_remedy(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    stored: dict[str, torch.Tensor] = {}
    for i in range(LAYERS):
        for leaf in ("to_q", "to_k", "to_v"):
            name = f"lycoris_layers_{i}_attention_{leaf}"
            stored[f"{name}.lokr_w1"] = torch.randn(4, 4, generator=generator)
            stored[f"{name}.lokr_w2"] = torch.randn(12, 12, generator=generator)
    save_file(stored, tmp_path / "apart.safetensors", {"modelspec.architecture": "z-image/lora"})
    with pytest.raises(UnsupportedError, match="90 parts") as refused:
        loratools.convert(tmp_path / "apart.safetensors", tmp_path / "fused.safetensors", format="comfy")
    assert all("'loratools resize' makes LoRA of it" in line for line in refused.value.details)
    # The remedy is one.
    loratools.resize(tmp_path / "apart.safetensors", tmp_path / "lora.safetensors", rank=48, format="comfy")
    lora = load_file(tmp_path / "lora.safetensors")
    a, b = (lora[f"{Z_IMAGE.format(3)}.qkv.lora_{part}.weight"].double() for part in "AB")
    want = torch.cat([kron_delta(stored, f"lycoris_layers_3_attention_{leaf}") for leaf in ("to_q", "to_k", "to_v")])
    torch.testing.assert_close(b @ a, want, rtol=1e-4, atol=1e-4)


def flux2_lokr(rows_of_w1: int) -> dict[str, torch.Tensor]:
    """All double blocks' fused projections and single blocks of FLUX.2 dev, at a width of 64."""
    generator, width = torch.Generator().manual_seed(4), 64
    stored: dict[str, torch.Tensor] = {}

    def add(name: str, w1: tuple[int, int], w2: tuple[int, int]) -> None:
        stored[f"diffusion_model.{name}.lokr_w1"] = torch.randn(*w1, generator=generator)
        stored[f"diffusion_model.{name}.lokr_w2"] = torch.randn(*w2, generator=generator)

    for i in range(8):
        add(f"double_blocks.{i}.img_attn.qkv", (rows_of_w1, 4), (3 * width // rows_of_w1, width // 4))
    for i in range(48):
        add(f"single_blocks.{i}.linear1", (4, 4), (9 * width // 4, width // 4))
    return stored


def test_a_fused_lokr_is_cut_between_the_rows_of_its_first_matrix(tmp_path: Path) -> None:
    stored = flux2_lokr(6)
    save_file(stored, tmp_path / "fused.safetensors")
    loratools.convert(tmp_path / "fused.safetensors", tmp_path / "apart.safetensors", format="lycoris")
    written = load_file(tmp_path / "apart.safetensors")
    whole = kron_delta(stored, "diffusion_model.double_blocks.5.img_attn.qkv")
    for i, leaf in enumerate(("to_q", "to_k", "to_v")):
        piece = kron_delta(written, f"lycoris_transformer_blocks_5_attn_{leaf}")
        assert torch.equal(piece, whole[64 * i : 64 * (i + 1)])


def test_a_fused_lokr_that_cannot_be_cut_is_one_of_the_projection_that_diffusers_fuses(tmp_path: Path) -> None:
    stored = flux2_lokr(4)
    save_file(stored, tmp_path / "fused.safetensors")
    with pytest.raises(UnsupportedError, match="8 parts") as refused:
        loratools.convert(tmp_path / "fused.safetensors", tmp_path / "lycoris.safetensors", format="lycoris")
    assert "'loratools resize' makes LoRA of it" in refused.value.details[0]
    out = tmp_path / "diffusers.safetensors"
    loratools.convert(tmp_path / "fused.safetensors", out, format="diffusers")
    written = load_file(out)
    want = kron_delta(stored, "diffusion_model.double_blocks.5.img_attn.qkv")
    assert torch.equal(kron_delta(written, "transformer.transformer_blocks.5.attn.to_qkv"), want)
    # Read again, it is the same module.
    loratools.convert(out, tmp_path / "back.safetensors", format="comfy")
    back = load_file(tmp_path / "back.safetensors")
    assert {key for key in back if not key.endswith(".alpha")} == set(stored)
    assert all(torch.equal(back[key], stored[key]) for key in stored)


def test_a_fused_lokr_made_smaller_is_written_apart(tmp_path: Path) -> None:
    stored = flux2_lokr(4)
    save_file(stored, tmp_path / "fused.safetensors")
    loratools.resize(tmp_path / "fused.safetensors", tmp_path / "small.safetensors", rank=64, format="diffusers")
    written = load_file(tmp_path / "small.safetensors")
    whole = kron_delta(stored, "diffusion_model.double_blocks.2.img_attn.qkv")
    for i, leaf in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.transformer_blocks.2.attn.{leaf}"
        a, b = (written[f"{name}.lora_{part}.weight"].double() for part in "AB")
        torch.testing.assert_close(b @ a, whole[64 * i : 64 * (i + 1)], rtol=1e-4, atol=1e-4)


def test_the_halves_of_a_lokr_are_not_left_in_the_wrong_order(tmp_path: Path) -> None:
    # FLUX has (shift, scale) where diffusers has (scale, shift): what cannot be exchanged is refused.
    stored = {
        "lycoris_norm_out_linear.lokr_w1": torch.ones(3, 4),
        "lycoris_norm_out_linear.lokr_w2": torch.ones(32, 12),
    }
    for i in range(19):
        stored[f"lycoris_transformer_blocks_{i}_attn_to_out_0.lokr_w1"] = torch.ones(4, 4)
        stored[f"lycoris_transformer_blocks_{i}_attn_to_out_0.lokr_w2"] = torch.ones(12, 12)
    save_file(stored, tmp_path / "one.safetensors", {"modelspec.architecture": "flux-1-dev/lora"})
    with pytest.raises(UnsupportedError, match="1 part") as refused:
        loratools.convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", format="kohya")
    assert "halves" in refused.value.details[0]
