"""Adapters for tests of layouts, made without the package that is tested, and merges of them in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 3, 6  # scale 2


def save_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    """A PEFT folder of one LoRA for each module (out, in); its deltas, in float64."""
    g = torch.Generator().manual_seed(seed)
    parts: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for module, (out, width) in shapes.items():
        a, b = torch.randn(RANK, width, generator=g), torch.randn(out, RANK, generator=g)
        parts |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[module] = ALPHA / RANK * b.double() @ a.double()
    folder.mkdir(parents=True)
    save_file(parts, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def assert_added(after: Tensor, before: Tensor, delta: Tensor) -> None:
    """That `after` is `before + delta`, rounded to float32 after a sum of a few terms in float32."""
    exact = before.double() + delta
    assert float((after.double() - exact).abs().max()) <= 1e-5
    assert float(delta.abs().max()) > 0.1  # or this would show nothing
