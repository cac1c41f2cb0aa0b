"""extract, spectrum and compare from quantised models, without any option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools

NAME = "model.layers.0.self_attn.q_proj"
OUT, IN = 48, 64


def folder_of(path: Path, weights: dict[str, Tensor], config: dict[str, object] | None = None) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    document = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **(config or {})}
    (path / "config.json").write_text(json.dumps(document))
    return path


def float8_and_its_values(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer in float8 with a scale for each row, and what it is worth in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(OUT, 1, generator=generator) + 0.5
    return {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}, weight.float() * scale


def test_a_low_rank_change_of_a_quantised_base_is_extracted_exactly(tmp_path: Path) -> None:
    packed, values = float8_and_its_values(0)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(OUT, 3, generator=generator) @ torch.randn(3, IN, generator=generator)
    base = folder_of(tmp_path / "base", packed, {"quantization_config": {"quant_method": "fp8"}})
    tuned = folder_of(tmp_path / "tuned", {f"{NAME}.weight": values + update})

    loratools.extract(base, tuned, tmp_path / "out", rank=3)

    adapter = loratools.load(tmp_path / "out")
    factors = adapter.updates[NAME].factors()
    assert factors is not None
    delta = factors.b.double() @ factors.a.double() * adapter.updates[NAME].scale
    assert torch.allclose(delta, update.double(), atol=1e-4)


def test_the_spectrum_of_a_difference_of_two_quantised_models_is_that_of_their_values(tmp_path: Path) -> None:
    before, old = float8_and_its_values(2)
    after, new = float8_and_its_values(3)
    base, tuned = folder_of(tmp_path / "base", before), folder_of(tmp_path / "tuned", after)

    report = loratools.spectrum(tuned, base=base)

    (module,) = report.modules
    assert module.norm == pytest.approx(float((new.double() - old.double()).norm()), rel=1e-5)


def test_a_model_and_its_quantised_copy_differ_by_the_error_of_the_quantisation(tmp_path: Path) -> None:
    packed, values = float8_and_its_values(4)
    plain = folder_of(tmp_path / "plain", {f"{NAME}.weight": values + 0.01})
    quantised = folder_of(tmp_path / "quantised", packed)

    report = loratools.spectrum(quantised, base=plain)

    (module,) = report.modules
    assert module.norm == pytest.approx(0.01 * (OUT * IN) ** 0.5, rel=1e-3)
