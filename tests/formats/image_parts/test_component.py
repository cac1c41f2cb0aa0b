"""PEFT folders of image models: what their names leave open, and that the hints say what works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import UnsupportedError

RANK, WIDTH = 3, 3072
FORMATS = ("bare", "bfl", "comfy", "diffusers", "kohya", "lycoris", "onetrainer", "xlabs")


def folder(path: Path, names: dict[str, tuple[int, int]]) -> Path:
    """A PEFT folder of these modules, with outputs and inputs of each, whose config names no class."""
    path.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in names.items():
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": torch.ones(RANK, columns),
            f"base_model.model.{name}.lora_B.weight": torch.ones(rows, RANK),
        }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": sorted(names)}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_every_base_that_the_hint_names_is_accepted(tmp_path: Path, format: str) -> None:
    names = {f"transformer_blocks.{i}.attn.{leaf}": (WIDTH, WIDTH) for i in range(3) for leaf in ("to_q", "to_out.0")}
    source = folder(tmp_path / "adapter", names)
    with pytest.raises(UnsupportedError, match="do not say which part of an image or video model") as caught:
        loratools.convert(source, tmp_path / "out.safetensors", format=format)
    assert caught.value.hint is not None
    assert "--allow-partial" not in caught.value.hint
    families = re.findall(r"--base (\S+)", caught.value.hint)
    assert "flux" in families
    for family in families:
        adapter = loratools.load(source, base=family)
        assert set(adapter.updates) == {f"transformer.{name}" for name in names}
    loratools.convert(source, tmp_path / "out.safetensors", format=format, base="flux")


def test_leaving_all_out_is_no_remedy(tmp_path: Path) -> None:
    names = {f"layers.{i}.attention.to_q": (3840, 3840) for i in range(2)}
    source = folder(tmp_path / "adapter", names)
    with pytest.raises(UnsupportedError, match="cannot be written as bfl") as caught:
        loratools.convert(source, tmp_path / "out.safetensors", format="bfl", base="z-image")
    assert caught.value.hint is None
    assert "of a model that is not Flux" in caught.value.details[0]


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_of_a_language_model_is_led_to_formats_of_such_models(tmp_path: Path, format: str) -> None:
    source = folder(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (10, 6)})
    with pytest.raises(UnsupportedError) as caught:
        loratools.convert(source, tmp_path / "out.safetensors", format=format)
    assert caught.value.hint == "choose a format of language models with --to: peft, mlx or gguf"
    loratools.convert(source, tmp_path / "out", format="mlx")
