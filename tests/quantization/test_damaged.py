"""Packed weights whose parts are missing or of another size: refused by name, and never a crash or a wrong value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import extract
from loratools.checkpoints import open_checkpoint
from loratools.errors import UnsupportedError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantised"
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


def damaged(case: str, folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """The fixture with one stored tensor replaced, or left out."""
    stored = load_file(FIXTURES / case / "model.safetensors")
    del stored[name]
    if tensor is not None:
        stored[name] = tensor.contiguous()
    stored["other.weight"] = torch.ones(3, 5)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_bytes((FIXTURES / case / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_missing_or_shortened_part_is_refused_or_leaves_nothing_that_cannot_be_read(
    case: str, tmp_path: Path
) -> None:
    stored = load_file(FIXTURES / case / "model.safetensors")
    for i, (name, tensor) in enumerate(stored.items()):
        shortened = [tensor[:-1]] if tensor.dim() and len(tensor) > 1 else []
        narrowed = [tensor[:, :-1]] if tensor.dim() == 2 and tensor.shape[1] > 1 else []
        for j, changed in enumerate([None, *shortened, *narrowed]):
            folder = tmp_path / f"{i}-{j}"
            folder.mkdir()
            checkpoint = open_checkpoint(damaged(case, folder, name, changed))
            # Whatever is offered as a weight has values.
            assert all(weight.read().shape == weight.shape for weight in checkpoint.weights.values())


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("bitsandbytes-nf4-float32", "weight.absmax"),
        ("bitsandbytes-int8", "SCB"),
        ("fp8-blocks", "weight_scale_inv"),
        ("compressed-int4-asymmetric-64", "weight_zero_point"),
        ("compressed-nvfp4", "weight_scale"),
        ("awq", "qzeros"),
        ("mlx-affine4", "scales"),
        ("hqq-4-axis1", "zero"),
        ("torchao-int8", "_weight_scale"),
    ],
)
def test_a_part_of_another_size_is_an_error_that_names_weight_and_scheme(case: str, part: str, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"
    tensor = load_file(FIXTURES / case / "model.safetensors")[name]
    folder = damaged(case, tmp_path, name, tensor[:-1])

    with pytest.raises(UnsupportedError, match="quantised in a way that is not read") as caught:
        extract(folder, FIXTURES / case, rank=2)

    assert caught.value.exit_code == 4
    assert any("model.layers.0.mlp.up_proj" in line for line in caught.value.details)
