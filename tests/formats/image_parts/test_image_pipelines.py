"""Pipelines of diffusers load what was converted from the authors' names, at tiny sizes: one for each loader.

Each layer of the loaded model is given a random input: it has to put out `x (W + alpha / r B A)^T + b`, with the
product computed in float64 from the factors themselves. A layer without factors has to be a plain one.
"""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
import torch
from formats.image_parts.tiny_pipelines import PIPELINES, linear_layers, model, pipeline
from naming.image import published
from safetensors.torch import save_file

import loratools

pytestmark = peers.needs("diffusers")
RANK, ALPHA = 2, 3.0


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_computes_with_what_was_converted_from_the_authors_names(tmp_path: Path, family: str) -> None:
    name, _ = PIPELINES[family]
    base = model(family)
    weights = {n: (m.weight.detach().clone(), m.bias) for n, m in linear_layers(base).items()}
    table = published.family(family)
    generator = torch.Generator().manual_seed(11)
    factors = {
        n: (torch.randn(RANK, w.shape[1], generator=generator), torch.randn(w.shape[0], RANK, generator=generator))
        for n, (w, _) in weights.items()
        if table.find(n) is not None
    }
    stored: dict[str, torch.Tensor] = {}
    for n, (a, b) in factors.items():
        stored |= {f"transformer.{n}.lora_A.weight": a, f"transformer.{n}.lora_B.weight": b * (ALPHA / RANK)}
    save_file(stored, tmp_path / "source.safetensors", {"loratools.family": family})
    loratools.convert(tmp_path / "source.safetensors", tmp_path / "comfy.safetensors", format="comfy", base=family)
    loratools.convert(tmp_path / "comfy.safetensors", tmp_path / "out.safetensors", format="diffusers", base=family)

    pipe = pipeline(name, base)
    pipe.load_lora_weights(str(tmp_path / "out.safetensors"))

    layers = {n: m for n, m in base.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(factors)
    for n, layer in layers.items():
        weight, bias = weights[n]
        a, b = factors[n]
        x = torch.randn(3, weight.shape[1], generator=generator)
        expected = x.double() @ (weight.double() + ALPHA / RANK * b.double() @ a.double()).T
        if bias is not None:
            expected = expected + bias.double()
        with torch.no_grad():
            output = layer(x).double()
        # float32: sums of at most 200 products.
        assert float((output - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), n


def test_every_loader_with_a_family_of_transformers_has_a_pipeline_here() -> None:
    from naming.image.test_loaders import LOADERS

    families = {family for families in LOADERS.values() for family in families}
    # UNets have whole pipelines in test_image_clients.py; that of HunyuanVideo 1.5 has no `load_lora_weights`.
    assert families - {"sd", "sdxl", "hunyuan-video15"} == set(PIPELINES)
