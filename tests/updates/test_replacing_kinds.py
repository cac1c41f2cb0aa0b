"""Kinds of PEFT that only replace weights: LN tuning and trained tokens, held against PEFT's own merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

warnings.filterwarnings("ignore", category=DeprecationWarning)
import peft  # noqa: E402

import loratools  # noqa: E402


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first_norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 10)
        self.last_norm = nn.LayerNorm(10)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, x: Tensor) -> Tensor:
        return x


# The kinds that have no file in `updates/`, as they have no updates, by PEFT's name of the type.
CONFIGS = {
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["first_norm", "last_norm"]),
    "LN_TUNING of a linear layer": lambda: peft.LNTuningConfig(target_modules=["linear"]),
    "LN_TUNING with a module to save": lambda: peft.LNTuningConfig(
        target_modules=["last_norm"], modules_to_save=["linear"]
    ),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["embedding"]),
}


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


def saved_base(folder: Path) -> Path:
    folder.mkdir()
    save_file(base_model().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def trained(folder: Path, name: str) -> Path:
    wrapped = peft.get_peft_model(base_model(), CONFIGS[name](), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(folder: Path) -> dict[str, Tensor]:
    model = copy.deepcopy(base_model())
    wrapped = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    merged = wrapped.merge_and_unload().state_dict()  # type: ignore[operator]
    # LN tuning leaves modules that it saves in their wrappers, with the weights of the base beside them.
    return {
        name.replace(".modules_to_save.default.", "."): tensor.detach()
        for name, tensor in merged.items()
        if ".original_module." not in name
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_equals_pefts(name: str, tmp_path: Path) -> None:
    base, adapter = saved_base(tmp_path / "base"), trained(tmp_path / "adapter", name)

    loratools.merge(base, adapter, tmp_path / "merged")

    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), merged_by_peft(adapter)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[weight], expected[weight]) for weight in expected)
    assert any(not torch.equal(found[weight], original) for weight, original in base_model().state_dict().items())


def test_norms_are_said_to_be_norms_and_come_back_from_what_is_written(tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", "LN_TUNING")
    loaded = loratools.load(adapter)
    assert {name: r.declared for name, r in loaded.replacements.items()} == {
        "first_norm.bias": "norm", "first_norm.weight": "norm", "last_norm.bias": "norm", "last_norm.weight": "norm",
    }  # fmt: skip

    loratools.convert(adapter, tmp_path / "written", format="peft")

    # PEFT itself reads what is written, as a LoRA without factors and with modules to save.
    expected = merged_by_peft(adapter)
    for weight, values in merged_by_peft(tmp_path / "written").items():
        assert torch.equal(values, expected[weight]), weight


def test_two_copies_of_one_norm_are_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "LN_TUNING")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.last_norm.ln_tuning_layers.weight"
    assert key in tensors
    tensors[key.replace("layers.weight", "layers.second.weight")] = torch.ones(10)
    save_file(tensors, folder / "adapter_model.safetensors")

    with pytest.raises(loratools.FormatError, match="more than one copy"):
        loratools.load(folder)


def test_its_keys_in_a_file_that_says_lora_are_refused_by_name(tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", "LN_TUNING")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA", "r": 4}))

    with pytest.raises(loratools.UnsupportedError, match="LN tuning"):
        loratools.load(folder)
