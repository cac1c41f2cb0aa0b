"""A pipeline with two transformers is Wan 2.2, whatever the sizes; each is written to a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.naming.image.evidence import denoisers

RANK, WIDTH = 3, 64


@pytest.mark.parametrize(
    ("part", "other"), [("transformer", "transformer_2.*"), ("transformer_2", "transformer.*")], ids=["high", "low"]
)
def test_each_transformer_is_written_under_the_names_of_one_model(tmp_path: Path, part: str, other: str) -> None:
    generator = torch.Generator().manual_seed(2)
    leaves = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    names = {f"blocks.{i}.attn1.{a}": f"blocks.{i}.self_attn.{b}" for i in range(2) for a, b in leaves.items()}
    stored = {
        f"{component}.{name}.lora_{factor}.weight": torch.randn(*shape, generator=generator)
        for component in ("transformer", "transformer_2")
        for name in names
        for factor, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }
    save_file(stored, tmp_path / "both.safetensors")

    loratools.convert(tmp_path / "both.safetensors", tmp_path / "one.safetensors", format="comfy", exclude=[other])

    written = load_file(tmp_path / "one.safetensors")
    for name, original in names.items():
        for factor in "AB":
            expected = stored[f"{part}.{name}.lora_{factor}.weight"]
            assert torch.equal(written.pop(f"diffusion_model.{original}.lora_{factor}.weight"), expected)
    assert not [key for key in written if not key.endswith(".alpha")]


def test_one_family_alone_has_two_transformers() -> None:
    assert [family.name for family in denoisers() if family.second] == ["wan"]
