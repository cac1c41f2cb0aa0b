"""What trainers of sharded models leave: state dicts of whole PeftModels, distributed checkpoints, an alpha of 0."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratools

RANK, ALPHA = 4, 6


class Model(nn.Module):
    """Two adapted layers, one that is trained whole, and one that is left alone; all sizes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


def trained(bias: str = "none") -> tuple[nn.Module, dict[str, Tensor]]:
    """A PeftModel with random factors, a head of ones, and its whole state dict."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], modules_to_save=["head"], init_lora_weights=False,
        bias=bias,
    )  # fmt: skip
    model = get_peft_model(Model(), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.ones_(parameter)
        elif name.endswith("up.base_layer.bias"):
            nn.init.constant_(parameter, 2.0)
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def dumped(folder: Path, tensors: dict[str, Tensor], stored: str) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    if stored == "model.safetensors":
        save_file(tensors, folder / stored, metadata={"format": "pt"})
    elif stored == "shards":
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save({"model": tensors} if stored == "pytorch_model_fsdp.bin" else tensors, folder / stored)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("stored", ["model.safetensors", "shards", "pytorch_model.bin", "pytorch_model_fsdp.bin"])
def test_the_state_dict_of_a_whole_model_is_read_as_the_adapter_in_it(tmp_path: Path, stored: str) -> None:
    model, tensors = trained()
    folder = dumped(tmp_path / "dump", tensors, stored)
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    config = (tmp_path / "saved" / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config)

    found, saved = loratools.load(folder), loratools.load(tmp_path / "saved")

    assert list(found) == list(saved) == ["down", "up"]
    assert list(found.replacements) == list(saved.replacements) == ["head.bias", "head.weight"]
    for name, tensor in saved.tensors().items():
        assert torch.equal(found.tensors()[name].read(), tensor.read()), name
    assert {module.scale for module in map(found.__getitem__, found)} == {ALPHA / RANK}
    assert any("of the base are not read" in warning for warning in found.warnings)
    (entry,) = loratools.inspect(folder).sources
    assert (entry.to_dict()["format"], entry.to_dict()["ranks"]) == ("peft", {str(RANK): 2})


def test_its_weights_of_the_base_are_not_merged_and_its_trained_ones_are(tmp_path: Path) -> None:
    _, tensors = trained()
    folder = dumped(tmp_path / "dump", tensors, "model.safetensors")
    base = {name: tensor + 1 for name, tensor in Model().state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")

    loratools.merge(tmp_path / "base", folder, tmp_path / "merged")

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["norm.weight"], base["norm.weight"])
    assert torch.equal(merged["head.weight"], torch.ones(3, 7))
    a, b = (tensors[f"base_model.model.up.lora_{part}.default.weight"].double() for part in "AB")
    # Without a config the alpha is taken to be the rank, so that the scale is 1.
    torch.testing.assert_close(merged["up.weight"].double(), base["up.weight"].double() + b @ a, rtol=1e-6, atol=1e-6)


def test_biases_that_the_config_says_were_trained_are_replaced(tmp_path: Path) -> None:
    model, tensors = trained(bias="lora_only")
    folder = dumped(tmp_path / "dump", tensors, "model.safetensors")
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    (folder / "adapter_config.json").write_text((tmp_path / "saved" / "adapter_config.json").read_text())

    replaced = loratools.load(folder).replacements

    assert sorted(replaced) == ["down.bias", "head.bias", "head.weight", "up.bias"]
    assert torch.equal(replaced["up.bias"].tensor.read(), torch.full((10,), 2.0))


def test_as_a_model_it_is_refused_with_what_it_is(tmp_path: Path) -> None:
    folder = dumped(tmp_path / "dump", trained()[1], "model.safetensors")

    with pytest.raises(loratools.UnsupportedError, match="not merged into its weights"):
        loratools.open_checkpoint(folder)


def test_a_whole_model_without_factors_is_no_adapter(tmp_path: Path) -> None:
    folder = dumped(tmp_path / "model", Model().state_dict(), "model.safetensors")

    assert loratools.open_checkpoint(folder).layout == "huggingface"
    with pytest.raises(loratools.FormatError, match="a model checkpoint, not an adapter"):
        loratools.load(folder)


def test_an_adapter_saved_by_peft_with_its_embedding_keeps_it(tmp_path: Path) -> None:
    """`base_layer.weight` in a file that names no adapter in its keys is a weight that was trained."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefix = "base_model.model.embed_tokens"
    tensors = {
        f"{prefix}.lora_embedding_A": torch.ones(RANK, 9),
        f"{prefix}.lora_embedding_B": torch.ones(6, RANK),
        f"{prefix}.base_layer.weight": torch.ones(9, 6),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))

    assert list(loratools.load(folder).replacements) == ["embed_tokens.weight"]


@pytest.mark.parametrize("inside", ["", "pytorch_model_fsdp_0"])
def test_the_command_for_a_distributed_checkpoint_makes_a_file_that_is_read(tmp_path: Path, inside: str) -> None:
    import torch.distributed.checkpoint as dcp

    _, tensors = trained()
    folder = tmp_path / "run"
    folder.mkdir()
    dcp.save({"model": tensors}, checkpoint_id=folder / inside)

    with pytest.raises(loratools.FormatError, match="distributed checkpoint") as raised:
        loratools.load(folder)
    with pytest.raises(loratools.FormatError, match="distributed checkpoint"):
        loratools.open_checkpoint(folder)
    command = (raised.value.hint or "").partition("python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, check=True, capture_output=True)

    adapter = loratools.load(tmp_path / "consolidated.bin")
    assert list(adapter) == ["down", "up"]
    a = tensors["base_model.model.up.lora_A.default.weight"]
    assert torch.equal(adapter.updates["up"].parts["A"].read(), a)


def without_alpha(folder: Path, **fields: object) -> Path:
    model, _ = trained()
    model.save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_an_alpha_of_0_changes_nothing_in_peft() -> None:
    layer = get_peft_model(Model(), LoraConfig(r=RANK, lora_alpha=0, target_modules=["up"], init_lora_weights=False))  # type: ignore[arg-type]
    delta = layer.base_model.model.up.get_delta_weight("default")  # type: ignore[union-attr, operator]
    assert not delta.any()


def test_an_alpha_of_0_is_uncertain_until_one_is_given(tmp_path: Path) -> None:
    folder = without_alpha(tmp_path / "adapter", lora_alpha=0)

    (entry,) = loratools.inspect(folder).sources
    warnings = entry.to_dict()["warnings"]
    assert isinstance(warnings, list)
    assert any("--alpha" in warning for warning in warnings)
    for verb in (loratools.spectrum, lambda a: loratools.resize(a, rank=2), lambda a: loratools.combine([a])):
        with pytest.raises(loratools.UnsupportedError, match="alpha is 0 in 2 modules"):
            verb(folder)
    loratools.convert(folder, tmp_path / "told", format="peft", alpha=ALPHA)

    told = loratools.load(tmp_path / "told")
    assert {told[name].scale for name in told} == {ALPHA / RANK}
    assert json.loads((tmp_path / "told" / "adapter_config.json").read_text())["lora_alpha"] == ALPHA


def test_only_the_modules_whose_alpha_is_0_get_the_given_one(tmp_path: Path) -> None:
    folder = without_alpha(tmp_path / "adapter", lora_alpha=0, alpha_pattern={"up": 2})

    loratools.convert(folder, tmp_path / "told", format="peft", alpha=ALPHA)

    told = loratools.load(tmp_path / "told")
    assert (told["up"].scale, told["down"].scale) == (2 / RANK, ALPHA / RANK)
