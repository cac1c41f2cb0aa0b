"""One quantised weight of every scheme that a merge can write again: the fixtures as models."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
# The quantised weight of most of them, and its size.
UP = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 24, 128
CASES = [
    "awq", "bitsandbytes-fp4-float32", "bitsandbytes-int8", "bitsandbytes-nf4-float32",
    "bitsandbytes-nf4-nested-bfloat16", "compressed-fp8-block", "compressed-fp8-channel", "compressed-fp8-tensor",
    "compressed-int4-asymmetric-64", "compressed-int3-symmetric-64", "compressed-int8-channel", "compressed-mxfp4",
    "compressed-nvfp4", "fp8-blocks", "mlx-affine4", "mlx-affine3", "mlx-mxfp4", "mlx-nvfp4", "mxfp8",
]  # fmt: skip


def base_of(case: str, folder: Path) -> Path:
    """The fixture as a model: with a plain embedding beside the packed weight, and all that a config has."""
    folder.mkdir()
    tensors = load_file(FIXTURES / case / "model.safetensors")
    save_file({**tensors, "model.embed_tokens.weight": torch.ones(5, 128)}, folder / "model.safetensors")
    shutil.copy(FIXTURES / case / "config.json", folder)
    return folder
