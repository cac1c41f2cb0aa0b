"""`BLOCK.diff_m`, LightX2V's difference of the modulation of Wan: `modulation' = modulation + weight * diff`."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.errors import UnsupportedError

BLOCKS, HEADS, HEAD_WIDTH = 2, 2, 12
WIDTH = HEADS * HEAD_WIDTH
WEIGHT = 0.7


@pytest.fixture
def lightx2v(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(5)
    stored: dict[str, Tensor] = {"diffusion_model.head.diff_m": torch.randn(1, 2, WIDTH, generator=g)}
    for i in range(BLOCKS):
        block = f"diffusion_model.blocks.{i}"
        stored[f"{block}.diff_m"] = torch.randn(1, 6, WIDTH, generator=g)
        stored[f"{block}.self_attn.q.lora_down.weight"] = torch.randn(3, WIDTH, generator=g)
        stored[f"{block}.self_attn.q.lora_up.weight"] = torch.randn(WIDTH, 3, generator=g)
    save_file(stored, tmp_path / "distilled.safetensors")
    return tmp_path / "distilled.safetensors"


@pytest.fixture
def authors_model(tmp_path: Path) -> Path:
    """A file with the authors' names, of the modules that the adapter is for."""
    g = torch.Generator().manual_seed(6)
    weights = {"head.modulation": torch.randn(1, 2, WIDTH, generator=g)}
    for i in range(BLOCKS):
        weights[f"blocks.{i}.modulation"] = torch.randn(1, 6, WIDTH, generator=g)
        for leaf in "qkvo":
            weights[f"blocks.{i}.self_attn.{leaf}.weight"] = torch.randn(WIDTH, WIDTH, generator=g)
        weights[f"blocks.{i}.ffn.0.weight"] = torch.randn(40, WIDTH, generator=g)
    save_file({f"model.diffusion_model.{name}": t for name, t in weights.items()}, tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors"


def expected(before: Tensor, diff: Tensor) -> Tensor:
    return (before.double() + WEIGHT * diff.double()).float()


def test_a_merge_adds_the_difference_to_the_modulation_of_the_authors_model(
    lightx2v: Path, authors_model: Path, tmp_path: Path
) -> None:
    loratools.merge(authors_model, [(lightx2v, WEIGHT)], tmp_path / "merged.safetensors")

    merged, before, adapter = (load_file(p) for p in (tmp_path / "merged.safetensors", authors_model, lightx2v))
    for block in ("blocks.0", "blocks.1", "head"):
        name = f"model.diffusion_model.{block}.modulation"
        torch.testing.assert_close(
            merged[name], expected(before[name], adapter[f"diffusion_model.{block}.diff_m"]), rtol=2**-23, atol=1e-7
        )
    q = "model.diffusion_model.blocks.1.self_attn.q.weight"
    up, down = (adapter[f"diffusion_model.blocks.1.self_attn.q.lora_{part}.weight"].double() for part in ("up", "down"))
    torch.testing.assert_close(merged[q].double(), before[q].double() + WEIGHT * up @ down, rtol=2**-23, atol=1e-6)


@peers.needs("diffusers")
def test_a_merge_adds_the_difference_to_the_table_that_diffusers_has_for_it(lightx2v: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        ffn_dim=40,
        text_dim=20,
        freq_dim=16,
    )
    model.save_pretrained(tmp_path / "wan")

    loratools.merge(tmp_path / "wan", [(lightx2v, WEIGHT)], tmp_path / "merged")

    merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged").state_dict()
    adapter = load_file(lightx2v)
    before = model.state_dict()
    for block, name in {"blocks.1": "blocks.1.scale_shift_table", "head": "scale_shift_table"}.items():
        diff = adapter[f"diffusion_model.{block}.diff_m"]
        torch.testing.assert_close(merged[name], expected(before[name], diff), rtol=2**-23, atol=1e-7)


def test_it_keeps_its_spelling_where_names_stay(lightx2v: Path, tmp_path: Path) -> None:
    loratools.resize(lightx2v, tmp_path / "smaller.safetensors", rank=2)

    before, after = load_file(lightx2v), load_file(tmp_path / "smaller.safetensors")
    assert {name for name in after if name.endswith("diff_m")} == {name for name in before if name.endswith("diff_m")}
    assert torch.equal(after["diffusion_model.head.diff_m"], before["diffusion_model.head.diff_m"])


def test_a_combination_adds_the_differences(lightx2v: Path, tmp_path: Path) -> None:
    loratools.combine([(lightx2v, 0.5), (lightx2v, 0.25)], tmp_path / "both.safetensors", method="linear")

    before, after = load_file(lightx2v), load_file(tmp_path / "both.safetensors")
    key = "diffusion_model.blocks.0.diff_m"
    torch.testing.assert_close(after[key], 0.75 * before[key])


def test_it_is_written_for_comfyui_under_the_name_of_the_parameter(lightx2v: Path, tmp_path: Path) -> None:
    """ComfyUI finds a difference of what is no weight by the parameter's name and `.diff`."""
    loratools.convert(lightx2v, tmp_path / "comfy.safetensors", format="comfy", base="wan")

    before, after = load_file(lightx2v), load_file(tmp_path / "comfy.safetensors")
    for block in ("blocks.0", "blocks.1", "head"):
        assert torch.equal(after[f"diffusion_model.{block}.modulation.diff"], before[f"diffusion_model.{block}.diff_m"])
    # What was written is read as what it was.
    again = loratools.load(tmp_path / "comfy.safetensors")
    assert sorted(again.updates) == sorted(loratools.load(lightx2v).updates)


def test_kohyas_names_have_none_for_it(lightx2v: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be written as kohya") as refused:
        loratools.convert(lightx2v, tmp_path / "kohya.safetensors", format="kohya", base="wan")

    assert len(refused.value.details) == BLOCKS + 1
    assert all("a parameter and no module" in line for line in refused.value.details)
