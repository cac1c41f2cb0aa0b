"""A base that is one file gives one file, and a name that promises another kind of output is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import OutputExistsError, UsageError

FIXTURES = Path(__file__).parents[3] / "fixtures"
BLOCKS = 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A single file of Wan with the authors' names, as ComfyUI has it."""
    generator = torch.Generator().manual_seed(5)
    names = [f"model.diffusion_model.blocks.{i}.self_attn.q.weight" for i in range(BLOCKS)]
    save_file({name: torch.randn(48, 32, generator=generator) for name in names}, tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(6)
    stored: dict[str, torch.Tensor] = {}
    for i in range(BLOCKS):
        stored[f"diffusion_model.blocks.{i}.self_attn.q.lora_A.weight"] = torch.randn(3, 32, generator=generator)
        stored[f"diffusion_model.blocks.{i}.self_attn.q.lora_B.weight"] = torch.randn(48, 3, generator=generator)
    save_file(stored, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_one_file_gives_one_file_with_the_names_of_the_base(model: Path, style: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    report = loratools.merge(model, [(style, 0.5)], out)
    assert out.is_file()
    assert report.output == out
    assert report.merged_weights == BLOCKS
    base, adapter, merged = load_file(model), load_file(style), load_file(out)
    assert set(merged) == set(base)
    for i in range(BLOCKS):
        name = f"blocks.{i}.self_attn.q"
        a, b = (adapter[f"diffusion_model.{name}.lora_{part}.weight"].double() for part in "AB")
        want = base[f"model.diffusion_model.{name}.weight"].double() + 0.5 * b @ a
        torch.testing.assert_close(merged[f"model.diffusion_model.{name}.weight"], want.float(), rtol=1e-6, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged.safetensors", "style.safetensors", "wan.safetensors"]


def test_its_header_says_what_went_into_it(model: Path, style: Path, tmp_path: Path) -> None:
    loratools.merge(model, [(style, 0.5)], tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", "pt") as opened:
        record = json.loads(opened.metadata()["loratools.merge"])
    assert record["adapters"][0]["weight"] == 0.5
    assert record["base"]["files"][0]["bytes"] == model.stat().st_size


def test_only_a_file_that_loratools_wrote_is_replaced(model: Path, style: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    loratools.merge(model, style, out)
    first = out.read_bytes()
    with pytest.raises(OutputExistsError):
        loratools.merge(model, style, out)
    loratools.merge(model, style, out, overwrite=True)
    assert out.read_bytes() == first
    save_file({"theirs": torch.ones(2)}, out)
    with pytest.raises(OutputExistsError):
        loratools.merge(model, style, out, overwrite=True)
    assert set(load_file(out)) == {"theirs"}


def test_a_name_without_a_suffix_is_that_of_a_folder(model: Path, style: Path, tmp_path: Path) -> None:
    loratools.merge(model, style, tmp_path / "merged")
    assert (tmp_path / "merged" / "loratools.json").is_file()


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("m.safetensors", "is a folder and gives a folder", "-o m"),
        ("m.gguf", "merge writes safetensors", "leave out the suffix"),
        ("m.bin", "merge writes safetensors", "leave out the suffix"),
    ],
)
def test_the_name_of_a_file_is_refused_for_a_base_that_is_a_folder(
    tmp_path: Path, name: str, message: str, hint: str, plan: bool
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        loratools.merge(FIXTURES / "llama-tiny", FIXTURES / "llama-tiny-science", tmp_path / name, plan=plan)
    assert hint in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_is_refused_with_the_right_name(model: Path, style: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merge writes safetensors") as refused:
        loratools.merge(model, style, tmp_path / "merged.ckpt")
    assert "name it merged.safetensors" in (refused.value.hint or "")
    assert not (tmp_path / "merged.ckpt").exists()


def test_weights_that_are_to_be_cut_do_not_go_into_one_file(model: Path, style: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="files") as refused:
        loratools.merge(model, style, tmp_path / "merged.safetensors", max_shard_size="50KB")
    assert "--max-shard-size" in (refused.value.hint or "")
    assert not (tmp_path / "merged.safetensors").exists()


def test_a_failing_merge_into_one_file_leaves_nothing(model: Path, style: Path, tmp_path: Path) -> None:
    stored = load_file(style)
    stored["diffusion_model.blocks.7.self_attn.q.lora_A.weight"][0, 0] = float("nan")
    save_file(stored, style)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(loratools.LoraToolsError, match="not finite"):
        loratools.merge(model, style, tmp_path / "merged.safetensors")
    assert sorted(tmp_path.iterdir()) == before
