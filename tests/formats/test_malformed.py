"""Strangers' files that cannot be what they claim end with 4 and name the tensor, whatever reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import FormatError, InputError, LoraToolsError

Q = "base_model.model.model.layers.0.self_attn.q_proj."
FLUX = "diffusion_model.single_blocks.0.linear1."
MLX = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("file", "key", "bad"),
    [
        ("adapter_model.safetensors", Q + "lora_B.weight", torch.ones(10, 4, 3)),
        ("adapter_model.safetensors", Q + "lora_B.weight", torch.tensor(1.0)),
        ("adapter_model.safetensors", Q + "lora_A.weight", torch.ones(4, 0)),
        ("adapter_model.safetensors", Q + "lora_A.weight", torch.ones(4, 6, dtype=torch.int32)),
        ("flux.safetensors", FLUX + "lora_B.weight", torch.tensor(1.0)),
        ("flux.safetensors", FLUX + "lora_A.weight", torch.ones(4, 0)),
        ("flux.safetensors", FLUX + "lora_A.weight", torch.ones(4, 6, dtype=torch.int32)),
        ("adapters.safetensors", MLX + "lora_b", torch.ones(4, 10, dtype=torch.int32)),
        ("adapters.safetensors", MLX + "lora_a", torch.tensor(1.0)),
    ],
)
def test_factor_that_is_none_is_named(tmp_path: Path, file: str, key: str, bad: torch.Tensor) -> None:
    tensors = {
        "adapter_model.safetensors": {Q + "lora_A.weight": torch.ones(4, 6), Q + "lora_B.weight": torch.ones(10, 4)},
        "flux.safetensors": {FLUX + "lora_A.weight": torch.ones(4, 6), FLUX + "lora_B.weight": torch.ones(10, 4)},
        "adapters.safetensors": {MLX + "lora_a": torch.ones(6, 4), MLX + "lora_b": torch.ones(4, 10)},
    }[file]
    save_file({**tensors, key: bad}, tmp_path / file)

    with pytest.raises(InputError) as caught:
        loratools.load(tmp_path / file)

    assert caught.value.exit_code == 4
    said = str(caught.value)
    assert file in said
    assert key.partition(".lora_")[0].removeprefix("base_model.model.") in said
    assert "lora_" in said


@pytest.mark.parametrize("broken", ["link", "fifo", "folder"])
@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_config_that_cannot_be_read_is_no_config_that_is_absent(tmp_path: Path, broken: str, whose: str) -> None:
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "adapter")
    config = tmp_path / whose / ("adapter_config.json" if whose == "adapter" else "config.json")
    config.unlink()
    if broken == "link":
        config.symlink_to("../blobs/missing")
    elif broken == "fifo":
        os.mkfifo(config)
    else:
        config.mkdir()

    with pytest.raises(LoraToolsError) as caught:
        loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    assert caught.value.exit_code in (2, 4)
    assert config.name in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("deep", ["[", '{"a":'])
def test_config_nested_deeply_is_refused(tmp_path: Path, deep: str) -> None:
    factories.checkpoint_folder(tmp_path / "base")
    factories.adapter_folder(tmp_path / "adapter")
    config = tmp_path / "base" / "config.json"
    close = "]" if deep == "[" else "}"
    nested = deep * 900 + "1" + close * 900
    config.write_text(config.read_text().rstrip().removesuffix("}") + f', "zz": {nested}}}')

    with pytest.raises(FormatError, match="nested too deeply"):
        loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("pattern", [".*" + "a?" * 60 + "a" * 60 + "zz", ".*" + "(a|a)?" * 60 + "zz", ".*(a+)+b"])
def test_pattern_of_ia3_that_takes_for_ever_is_refused(tmp_path: Path, pattern: str) -> None:
    key = f"base_model.model.model.layers.0.{'a' * 60}.ia3_l"
    save_file({key: torch.ones(1, 6, 1, 1)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(FormatError, match="feedforward_modules"):
        loratools.load(tmp_path)
