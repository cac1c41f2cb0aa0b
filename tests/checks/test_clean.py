"""Adapters with nothing wrong give neither errors nor warnings, whatever their format, kind and family."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from check_samples import sound
from safetensors.torch import save_file

import loratools

FIXTURES = Path(__file__).parents[2] / "fixtures"
ADAPTERS = sorted(path.parent.name for path in FIXTURES.glob("*/adapter_config.json"))
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
BASES = {
    "bert-tiny-sentiment": "bert-tiny",
    "llama-tied-tiny-tokens": "llama-tied-tiny",
    "llama-tiny-dialogue": "llama-tiny",
    "llama-tiny-science": "llama-tiny",
    "llama-tiny-shakespeare": "llama-tiny",
}
# A file of sam-lora has no names, only the numbers of SAM's blocks: its own tests write it.
WRITTEN = [entry.name for entry in loratools.list_formats() if entry.write and entry.name != "sam-lora"]
# Modules of SDXL and of Flux as kohya flattens them, for formats that only one of the two has: inputs, outputs.
SDXL = {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (2048, 640)}
FLUX = {"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}
XLABS = {f"lora_unet_double_blocks_0_{name}": shape for name, shape in {
    "img_attn_qkv": (3072, 9216), "img_attn_proj": (3072, 3072),
    "txt_attn_qkv": (3072, 9216), "txt_attn_proj": (3072, 3072),
}.items()}  # fmt: skip


def complaints(*sources: Path, **arguments: object) -> list[str]:
    report = loratools.check(*sources, **arguments)  # type: ignore[arg-type]
    return [f"{finding.id}: {finding.message}" for finding in report.findings if finding.severity != "note"]


def image_file(path: Path, format: str) -> Path:
    """A file of kohya whose modules the format has names for."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    modules = {"xlabs": XLABS, "bfl": FLUX, "onetrainer": FLUX}.get(format, SDXL)
    for name, (inputs, outputs) in modules.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(3, inputs, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 3, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def test_fixtures_are_there() -> None:
    assert set(BASES) <= set(ADAPTERS)
    assert len(MODELS) >= 4


@pytest.mark.parametrize("name", ADAPTERS)
def test_trained_adapter_has_no_complaints(name: str) -> None:
    assert complaints(FIXTURES / name) == []


@pytest.mark.parametrize(("adapter", "base"), BASES.items())
def test_trained_adapter_fits_its_base_without_complaints(adapter: str, base: str) -> None:
    assert complaints(FIXTURES / adapter, base=FIXTURES / base) == []


@pytest.mark.parametrize("name", MODELS)
def test_model_has_no_complaints(name: str) -> None:
    assert complaints(FIXTURES / name) == []


@pytest.mark.parametrize("name", sorted(path.name for path in (FIXTURES / "quantised").iterdir() if path.is_dir()))
def test_quantised_model_has_no_complaints(name: str) -> None:
    assert complaints(FIXTURES / "quantised" / name) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_of_an_adapter_is_no_reason_to_complain(tmp_path: Path, dtype: str) -> None:
    assert complaints(sound(tmp_path, dtype=getattr(torch, dtype))) == []


@pytest.mark.parametrize("format", WRITTEN)
def test_every_format_that_is_written_has_no_complaints(tmp_path: Path, format: str) -> None:
    text = format in ("peft", "mlx", "gguf")
    source = FIXTURES / "llama-tiny-shakespeare" if text else image_file(tmp_path / "source.safetensors", format)
    base = FIXTURES / "llama-tiny" if text else "flux" if format == "bfl" else None
    out = tmp_path / f"out{'' if format in ('peft', 'mlx') else '.gguf' if format == 'gguf' else '.safetensors'}"
    loratools.convert(source, out, format=format, base=base)

    assert complaints(out, base=base) == []


@pytest.mark.parametrize("stored", ["rank_pattern", "dora", "conv", "embedding", "rslora"])
def test_variant_of_lora_has_no_complaints(tmp_path: Path, stored: str) -> None:
    match stored:
        case "rank_pattern":
            ranks = {"model.layers.0.self_attn.q_proj": 2}
            folder = sound(tmp_path, ranks=ranks, config={"rank_pattern": {"layers.0.self_attn.q_proj": 2}})
        case "dora":
            extra = {f"{name}.lora_magnitude_vector": torch.ones(out) for name, (out, _) in factories.MODULES.items()}
            folder = sound(tmp_path, extra=extra, config={"use_dora": True})
        case "conv":
            values = {"conv": (torch.randn(4, 6, 3, 3), torch.randn(10, 4, 1, 1))}
            folder = sound(tmp_path, values=values, config={"target_modules": ["conv"]})
        case "embedding":
            extra = {
                "model.embed_tokens.lora_embedding_A": torch.randn(4, 13),
                "model.embed_tokens.lora_embedding_B": torch.randn(6, 4),
            }
            folder = sound(tmp_path, extra=extra, config={"target_modules": ["q_proj", "v_proj", "embed_tokens"]})
        case _:
            folder = sound(tmp_path, config={"use_rslora": True})

    assert complaints(folder) == []
