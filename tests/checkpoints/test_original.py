from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file, save_file

import loratools
from loratools.checkpoints import open_checkpoint

NAME = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        f"{NAME}.weight": torch.randn(10, 6, generator=g),
        "first_stage_model.decoder.conv_in.weight": torch.randn(4, 3, 1, 1, generator=g),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(7)[None],
    }


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
def test_a_single_file_keeps_its_names_and_is_written_as_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".ckpt"):
        torch.save({"state_dict": weights(), "global_step": 470000}, path)
    else:
        save_file(weights(), path)
    (tmp_path / "readme.md").write_text("about something else")
    (delta,) = save_adapter(tmp_path / "adapter", {NAME: (10, 6)}).values()

    report = loratools.merge(path, [tmp_path / "adapter"], tmp_path / "out")

    assert open_checkpoint(path).layout == "original"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"sd.safetensors", "loratools.json", "README.md"}
    merged = load_file(tmp_path / "out" / "sd.safetensors")
    assert merged.keys() == weights().keys()
    assert_added(merged[f"{NAME}.weight"], weights()[f"{NAME}.weight"], delta)
    assert all(torch.equal(merged[n], t) for n, t in weights().items() if n != f"{NAME}.weight")
    assert any("written as safetensors" in w for w in report.warnings) == name.endswith(".ckpt")


def test_a_prefix_that_only_the_file_has_is_found(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "sd.safetensors")
    (delta,) = save_adapter(tmp_path / "adapter", {NAME.removeprefix("model."): (10, 6)}).values()

    loratools.merge(tmp_path / "sd.safetensors", [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "sd.safetensors")
    assert_added(merged[f"{NAME}.weight"], weights()[f"{NAME}.weight"], delta)
