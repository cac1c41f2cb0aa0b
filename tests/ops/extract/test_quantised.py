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


def quantised_and_tuned(tmp_path: Path, *, from_values: bool) -> tuple[Path, Path, float]:
    """A base of int4 in groups of 32, a fine-tune of rank 3 of its full-precision weights or of its values, and the
    norm of the error of quantisation."""
    rows, columns = 288, 352
    generator = torch.Generator().manual_seed(5)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    groups = weight.reshape(rows, -1, 32)
    scale = groups.abs().amax(dim=-1) / 7.5
    codes = (groups / scale[..., None]).round().clamp(-8, 7)
    values = (codes * scale[..., None]).reshape(rows, columns)
    words = ((codes + 8).reshape(rows, -1, 8).long() << (4 * torch.arange(8))).sum(dim=-1)
    packed = {
        f"{NAME}.weight_packed": torch.where(words >= 2**31, words - 2**32, words).int(),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_shape": torch.tensor([rows, columns]),
    }
    size = 0.0005 if from_values else 0.001
    update = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator) * size
    base = folder_of(tmp_path / "base", packed, {"quantization_config": {"quant_method": "compressed-tensors"}})
    tuned = folder_of(tmp_path / "tuned", {f"{NAME}.weight": (values if from_values else weight) + update})
    return base, tuned, float((weight.double() - values.double()).norm())


def test_an_extraction_says_how_much_of_the_change_is_the_error_of_quantisation(tmp_path: Path) -> None:
    base, tuned, error = quantised_and_tuned(tmp_path, from_values=False)

    report = loratools.extract(base, tuned, noise_edge=True)

    (module,) = report.modules
    assert module.quantization_error == pytest.approx(error, rel=0.05)
    assert module.norm is not None
    assert report.quantization_error == pytest.approx(error / module.norm, rel=0.05)
    assert module.rank == 3  # the error is noise, and --noise-edge leaves it out
    assert any("quantisation alone changes these weights by" in w and "--noise-edge" in w for w in report.warnings)


def test_a_change_smaller_than_the_error_of_quantisation_does_not_hold_it(tmp_path: Path) -> None:
    base, tuned, error = quantised_and_tuned(tmp_path, from_values=True)

    report = loratools.extract(base, tuned, noise_edge=True)

    (module,) = report.modules
    assert module.norm is not None
    assert module.norm < error / 1.5
    assert module.noise_edge == pytest.approx(0, abs=1e-6)
    assert any("started from the dequantised weights" in w for w in report.warnings)


def test_plain_models_have_no_error_of_quantisation(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(OUT, IN, generator=generator)
    base = folder_of(tmp_path / "base", {f"{NAME}.weight": weight})
    tuned = folder_of(tmp_path / "tuned", {f"{NAME}.weight": weight + torch.randn(OUT, IN, generator=generator)})

    report = loratools.extract(base, tuned, rank=2)

    assert report.quantization_error is None
    assert report.modules[0].quantization_error is None
    assert not any("quantisation" in warning for warning in report.warnings)
