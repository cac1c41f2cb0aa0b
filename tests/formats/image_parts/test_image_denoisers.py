"""What a denoiser puts out: with an adapter that diffusers loads, and with the same adapter merged into its weights.

The adapter is converted to the authors' names and back, so that both ways begin with a file that loratools wrote. One
goes through diffusers' own `load_lora_weights`, the other through `loratools.merge` and `from_pretrained`. All weights
are float64 but for one denoiser, so that what the two sums of a layer differ by is far below what a wrong layer does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from formats.image_parts.tiny_pipelines import PIPELINES, inputs, linear_layers, model, pipeline
from naming.image import published
from safetensors.torch import save_file

import loratools

pytestmark = peers.needs("diffusers")
RANK = 2


# Its embedding of the time computes in float32 whatever its weights are.
FLOAT32_ONLY = ("kandinsky5",)


@pytest.fixture
def dtype(family: str) -> Iterator[torch.dtype]:
    """The dtype of the weights, which is the default one meanwhile: some embeddings of the time are made in that."""
    chosen = torch.float32 if family in FLOAT32_ONLY else torch.float64
    torch.set_default_dtype(chosen)
    yield chosen
    torch.set_default_dtype(torch.float32)


def outputs(denoiser: torch.nn.Module, family: str, dtype: torch.dtype) -> torch.Tensor:
    """All that the denoiser puts out, as one row."""
    given = {name: _cast(value, dtype) for name, value in inputs(family).items()}
    with torch.no_grad():
        results = denoiser.to(dtype).eval()(**given, return_dict=False)
    flat = [tensor for result in results for tensor in (result if isinstance(result, list) else [result])]
    return torch.cat([tensor.flatten().double() for tensor in flat])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(entry, dtype) for entry in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("family", PIPELINES)
def test_a_denoiser_puts_out_the_same_with_a_loaded_and_a_merged_adapter(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    base = model(family).to(dtype)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    before = outputs(base, family, dtype)
    table = published.family(family)
    generator = torch.Generator().manual_seed(13)
    stored: dict[str, torch.Tensor] = {}
    for name, layer in linear_layers(base).items():
        if table.find(name) is not None:
            a = torch.randn(RANK, layer.in_features, generator=generator)
            b = torch.randn(layer.out_features, RANK, generator=generator) * 0.1
            stored |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    save_file(stored, tmp_path / "source.safetensors", {"loratools.family": family})
    loratools.convert(tmp_path / "source.safetensors", tmp_path / "comfy.safetensors", format="comfy", base=family)
    loratools.convert(tmp_path / "comfy.safetensors", tmp_path / "out.safetensors", format="diffusers", base=family)
    loratools.merge(tmp_path / "base", [tmp_path / "comfy.safetensors"], tmp_path / "merged")

    pipe = pipeline(PIPELINES[family][0], base)
    pipe.load_lora_weights(str(tmp_path / "out.safetensors"))
    loaded = outputs(base, family, dtype)
    merged = outputs(type(base).from_pretrained(tmp_path / "merged"), family, dtype)  # type: ignore[attr-defined]

    # Norms and angles in float32, as some denoisers have them in any case, are 1e-7 off, and amplified by two blocks.
    bound = 1e-4 if dtype == torch.float32 else 1e-5
    assert float((loaded - merged).norm()) <= bound * float((loaded - before).norm())
    assert float((loaded - before).norm()) >= 0.01 * float(before.norm())
