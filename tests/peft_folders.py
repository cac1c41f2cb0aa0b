"""Adapters as files, built without PEFT: sizes all differ (in 6, out 10, rank 4), so that a transposed factor shows."""

from collections.abc import Callable
from pathlib import Path

import torch

CONFIG: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Stored = Callable[..., Path]


def factors(module: str, *, rank: int = 4, out: int = 10, into: int = 6, infix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module) + rank)
    return {
        f"base_model.model.{module}.lora_A{infix}.weight": torch.randn(rank, into, generator=generator),
        f"base_model.model.{module}.lora_B{infix}.weight": torch.randn(out, rank, generator=generator),
    }
