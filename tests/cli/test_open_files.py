"""The number of files that are open at once does not grow with the number of files of a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("resource", reason="the number of open files is limited by POSIX systems")

SHARDS = 200
# What `ulimit -n 64` sets, for the process and for the workers that it starts.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from loratools.cli import main
main()
"""


def layer(number: int) -> str:
    return f"model.layers.{number}.mlp.up_proj"


def checkpoint(folder: Path, change: float) -> Path:
    folder.mkdir()
    index = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight = torch.arange(15.0).reshape(5, 3) + change * torch.outer(torch.arange(5.0), torch.ones(3))
        save_file({f"{layer(number)}.weight": weight}, folder / name)
        index[f"{layer(number)}.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir()
    tensors = {}
    for number in range(SHARDS):
        tensors[f"base_model.model.{layer(number)}.lora_A.weight"] = torch.ones(1, 3)
        tensors[f"base_model.model.{layer(number)}.lora_B.weight"] = torch.full((5, 1), number + 1.0)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def limited(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_model_of_200_files_is_read_and_written_by_a_process_that_may_open_64(tmp_path: Path) -> None:
    base, lora = checkpoint(tmp_path / "base", 0.0), adapter(tmp_path / "lora")

    limited("inspect", base, "--values")
    limited("merge", base, lora, "-o", tmp_path / "merged", "--threads", 2)
    limited("extract", base, tmp_path / "merged", "--rank", 1, "-o", tmp_path / "extracted")
    limited("spectrum", tmp_path / "merged", "--base", base)

    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == SHARDS
    last = load_file(files[-1])[f"{layer(SHARDS - 1)}.weight"]
    assert torch.equal(last, torch.arange(15.0).reshape(5, 3) + SHARDS)
    assert len(load_file(tmp_path / "extracted" / "adapter_model.safetensors")) == 2 * SHARDS
