"""Adapters as files, built without PEFT: sizes all differ (in 6, out 10, rank 4), so that a transposed factor shows."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CONFIG: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Stored = Callable[..., Path]


def factors(module: str, *, rank: int = 4, out: int = 10, into: int = 6, infix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module) + rank)
    return {
        f"base_model.model.{module}.lora_A{infix}.weight": torch.randn(rank, into, generator=generator),
        f"base_model.model.{module}.lora_B{infix}.weight": torch.randn(out, rank, generator=generator),
    }


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
