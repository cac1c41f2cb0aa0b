"""Whole tiny models, quantised by transformers and dequantised by it and by us: the same values."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
import tiny_models
import torch
from torch import Tensor

import loratools
from loratools.checkpoints import Checkpoint, open_checkpoint

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def assert_same_values(checkpoint: Checkpoint, theirs: dict[str, Tensor], packed: int) -> None:
    """All weights of the checkpoint are those of the model; so many of them are quantised."""
    assert checkpoint.quantisation is not None
    assert len(checkpoint.quantisation.weights) == packed
    assert checkpoint.weights.keys() <= theirs.keys()
    assert theirs.keys() - checkpoint.weights.keys() <= checkpoint.tied.keys()
    for name, weight in checkpoint.weights.items():
        assert torch.equal(weight.read().float(), theirs[name].float()), name


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("nested", [False, True])
def test_a_llama_in_nf4_has_the_values_that_transformers_dequantises_it_to(tmp_path: Path, nested: bool) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = tiny_models.llama(vocabulary=96, width=64, inner=128, heads=4, key_heads=2)
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "nf4")

    checkpoint = open_checkpoint(tmp_path / "nf4")

    assert_same_values(checkpoint, model.dequantize(dtype=torch.bfloat16).state_dict(), packed=2 * len(LINEAR))
    (entry,) = loratools.inspect(tmp_path / "nf4").to_dict()["sources"]
    (group,) = entry["quantised"]
    assert (group["scheme"], group["bits"], group["group"], len(group["weights"])) == ("bitsandbytes", 4, 64, 14)
    assert group["format"] == ("nf4, double quantisation" if nested else "nf4")
    assert entry["parameters"] == sum(p.numel() for p in plain.parameters())


def test_a_gpt_oss_in_mxfp4_has_the_values_that_transformers_dequantises_it_to(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    folder = tmp_path / "mxfp4"
    tiny_models.save_gpt_oss_in_mxfp4(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )

    assert_same_values(open_checkpoint(folder), model.state_dict(), packed=4)


def test_a_llama_in_fp8_has_the_values_that_transformers_dequantises_it_to(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = tmp_path / "fp8"
    tiny_models.save_llama_in_fp8_blocks(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )

    assert_same_values(open_checkpoint(folder), model.state_dict(), packed=len(LINEAR))
