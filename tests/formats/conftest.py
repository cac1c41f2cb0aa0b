"""The fixture that writes adapters in the format of PEFT, for tests of formats."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft_folders import CONFIG, Stored, factors
from safetensors.torch import save_file


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Write a folder; `config=None` leaves the config out, and keyword arguments change fields of the usual one."""

    def write(
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        name: str = "adapter",
        file: str = "adapter_model.safetensors",
        config: Mapping[str, object] | None = CONFIG,
        metadata: dict[str, str] | None = None,
        **fields: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        tensors = factors("layers.0.q_proj") | factors("layers.1.v_proj") if tensors is None else dict(tensors)
        save_file(tensors, folder / file, metadata or {"format": "pt"})
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return write
